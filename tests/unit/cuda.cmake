# SPDX-License-Identifier: MIT
# What asking for a card leads to where there is none: with the static library,
# with the shared one alone, beside a module of another version, and beside the
# right one.
foreach(kind static shared)
  add_executable(cuda_refused_${kind} cuda_refused.c)
  target_link_libraries(cuda_refused_${kind} PRIVATE
                        epx_world PkgConfig::CMOCKA)
endforeach()
target_link_libraries(cuda_refused_static PRIVATE epx_static)
target_link_libraries(cuda_refused_shared PRIVATE epx)

# cuda_refused_test(NAME KIND WORD ENGINES [FOLDER]): with what a folder has.
function(cuda_refused_test name kind word engines)
  add_test(NAME cuda_refused_${name}
           COMMAND cuda_refused_${kind} ${word} ${engines})
  set_tests_properties(cuda_refused_${name} PROPERTIES
                       TIMEOUT 120 SKIP_RETURN_CODE 77)
  if(ARGN)
    set_tests_properties(cuda_refused_${name} PROPERTIES
                         ENVIRONMENT LD_LIBRARY_PATH=${ARGN})
  endif()
endfunction()

# The shared library looks for the module beside itself, so copies of it stand
# apart from the one that was built.
set(alone ${CMAKE_CURRENT_BINARY_DIR}/epx_alone)
set(beside_other ${CMAKE_CURRENT_BINARY_DIR}/epx_beside_other)
add_library(cuda_other_module SHARED cuda_other_module.c)
set_target_properties(cuda_other_module PROPERTIES
  OUTPUT_NAME epx_cuda SOVERSION 0 LIBRARY_OUTPUT_DIRECTORY ${beside_other})
foreach(folder ${alone} ${beside_other})
  add_custom_command(TARGET cuda_refused_shared POST_BUILD
    COMMAND ${CMAKE_COMMAND} -E make_directory ${folder}
    COMMAND ${CMAKE_COMMAND} -E copy $<TARGET_FILE:epx>
            ${folder}/$<TARGET_SONAME_FILE_NAME:epx>
    VERBATIM)
endforeach()

cuda_refused_test(static static "instead of libepx.a" 1)
cuda_refused_test(no_module shared "cannot be loaded: libepx_cuda.so.0" 1
                  ${alone})
cuda_refused_test(other_module shared "version 999" 1 ${beside_other})
if(TARGET epx_cuda)
  cuda_refused_test(no_driver shared "EPX_DEVICE_CUDA finds no card" 2)
endif()

# The fabrics of each engine, by what ranks tell about themselves.
add_executable(fabric_choose fabric_choose.c)
target_link_libraries(fabric_choose PRIVATE
                      epx_internal_shared PkgConfig::CMOCKA)
foreach(engine cpu cuda)
  add_test(NAME fabric_choose_${engine} COMMAND fabric_choose ${engine})
  set_tests_properties(fabric_choose_${engine} PROPERTIES
                       TIMEOUT 120 SKIP_RETURN_CODE 77)
endforeach()
