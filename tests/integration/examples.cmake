# SPDX-License-Identifier: MIT
if(TARGET 01_threads)
  add_test(NAME example_01_threads COMMAND 01_threads)
  set_tests_properties(example_01_threads PROPERTIES TIMEOUT 120)
endif()

# epx_example_test(NAME RANKS PROGRAM [ARGUMENT]...): as a user would start it.
function(epx_example_test name ranks program)
  add_test(NAME example_${name}
           COMMAND epx-run -n ${ranks} -- $<TARGET_FILE:${program}> ${ARGN})
  set_tests_properties(example_${name} PROPERTIES TIMEOUT 300)
endfunction()

if(TARGET 01_threads AND TARGET epx-run)
  epx_example_test(02_processes 4 02_processes)
  epx_example_test(02_processes_uneven 3 02_processes)
  epx_example_test(03_decode 4 03_decode)
  epx_example_test(03_decode_alone 1 03_decode)
  epx_example_test(04_overlap 3 04_overlap)
  epx_example_test(moe_lm_gradients_alone 1 moe_lm --gradcheck)
  epx_example_test(moe_lm_gradients 2 moe_lm --gradcheck)

  foreach(case same_bits report_verdict no_text too_many_ranks)
    add_test(NAME example_moe_lm_${case}
             COMMAND ${CMAKE_CURRENT_LIST_DIR}/examples_moe_lm_test.sh
                     $<TARGET_FILE:epx-run> $<TARGET_FILE:moe_lm>
                     $<TARGET_FILE:moe_lm_report> ${case})
    set_tests_properties(example_moe_lm_${case} PROPERTIES TIMEOUT 300)
  endforeach()
endif()
