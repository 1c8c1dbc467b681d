# SPDX-License-Identifier: MIT
# What a sanitizer has instrumented cannot be linked without it.
include(CheckLanguage)
check_language(CXX)
if(CMAKE_CXX_COMPILER AND NOT EPX_SANITIZE)
  add_test(NAME install
           COMMAND ${CMAKE_CURRENT_LIST_DIR}/install_test.sh ${CMAKE_COMMAND}
                   ${PROJECT_BINARY_DIR} ${CMAKE_C_COMPILER}
                   ${CMAKE_CXX_COMPILER})
  set_tests_properties(install PROPERTIES TIMEOUT 300 SKIP_RETURN_CODE 77)
endif()
