# SPDX-License-Identifier: MIT
# The parts of epx-bench that can be tested by themselves.
if(TARGET epx_bench_parts)
  foreach(name options csv routing times barrier shape report)
    add_executable(bench_${name} bench_${name}_test.c)
    target_link_libraries(bench_${name} PRIVATE epx_bench_parts
                                                PkgConfig::CMOCKA)
    add_test(NAME bench_${name} COMMAND bench_${name})
    set_tests_properties(bench_${name} PROPERTIES TIMEOUT 300)
  endforeach()

  # In the place of NCCL.
  find_package(Threads REQUIRED)
  add_library(bench_nccl_fake SHARED bench_nccl_fake.c)
  target_link_libraries(bench_nccl_fake PRIVATE Threads::Threads)
  target_include_directories(bench_nccl_fake
                             PRIVATE ${PROJECT_SOURCE_DIR}/include
                                     ${PROJECT_SOURCE_DIR}/tools/bench)
  set_target_properties(bench_nccl_fake PROPERTIES
                        OUTPUT_NAME nccl SUFFIX .so.2
                        LIBRARY_OUTPUT_DIRECTORY
                        ${CMAKE_CURRENT_BINARY_DIR}/nccl_fake)
  add_executable(bench_nccl bench_nccl_test.c)
  add_dependencies(bench_nccl bench_nccl_fake)
  target_link_libraries(bench_nccl PRIVATE epx_bench_parts PkgConfig::CMOCKA
                                           ${CMAKE_DL_LIBS})
  add_test(NAME bench_nccl COMMAND bench_nccl)
  set_tests_properties(bench_nccl PROPERTIES TIMEOUT 300 ENVIRONMENT
                       "LD_LIBRARY_PATH=$<TARGET_FILE_DIR:bench_nccl_fake>:$ENV{LD_LIBRARY_PATH}")
endif()
