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
endif()
