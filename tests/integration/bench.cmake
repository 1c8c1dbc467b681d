# SPDX-License-Identifier: MIT
if(TARGET epx-bench)
  set(bench_cases usage json table layouts dtypes routings recorded send_only hosts
                  netns outside soak failure rank_killed launcher_killed mpi card)
  # A sanitizer wants to be loaded before anything else.
  if(NOT EPX_SANITIZE)
    add_library(bench_flip MODULE bench_flip.c)
    target_include_directories(bench_flip
                               PRIVATE ${PROJECT_SOURCE_DIR}/include)
    target_link_libraries(bench_flip PRIVATE ${CMAKE_DL_LIBS})
    list(APPEND bench_cases difference leaks)
    set(bench_flip $<TARGET_FILE:bench_flip>)
  endif()
  foreach(case IN LISTS bench_cases)
    add_test(NAME bench_run_${case}
             COMMAND ${CMAKE_CURRENT_LIST_DIR}/bench_test.sh
                     $<TARGET_FILE:epx-bench> ${case}
                     ${PROJECT_SOURCE_DIR}/../shared/data/routing ${bench_flip})
    set_tests_properties(bench_run_${case} PROPERTIES
                         TIMEOUT 300 SKIP_RETURN_CODE 77)
  endforeach()
  # UCX's end upsets the leak checker.
  set_property(TEST bench_run_netns PROPERTY
               ENVIRONMENT ASAN_OPTIONS=intercept_tls_get_addr=0)
  set_tests_properties(bench_run_card PROPERTIES
                       LABELS gpu RUN_SERIAL TRUE TIMEOUT 600)
endif()
