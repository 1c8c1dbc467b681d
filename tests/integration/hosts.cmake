# SPDX-License-Identifier: MIT
# Ranks on two hosts, which are network namespaces.
if(TARGET epx-run AND UCX_INCLUDE_DIR AND EPX_UCX)
  add_executable(hosts_meet ${CMAKE_CURRENT_LIST_DIR}/hosts_meet.c)
  target_link_libraries(hosts_meet PRIVATE epx)
  foreach(case run failure launcher_killed mpirun torchrun missing)
    add_test(NAME hosts_${case}
             COMMAND ${CMAKE_CURRENT_LIST_DIR}/hosts_test.sh
                     $<TARGET_FILE:epx-run> $<TARGET_FILE:hosts_meet> ${case})
    set_tests_properties(hosts_${case} PROPERTIES
                         TIMEOUT 120 SKIP_RETURN_CODE 77)
  endforeach()
  # UCX's end upsets the leak checker.
  set_property(TEST hosts_torchrun PROPERTY
               ENVIRONMENT ASAN_OPTIONS=intercept_tls_get_addr=0)
endif()
