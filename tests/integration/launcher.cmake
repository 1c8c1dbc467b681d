# SPDX-License-Identifier: MIT
if(TARGET epx-run)
  foreach(case exit_status prefix long_lines environment stdin
          failure_ends_job left_behind interrupt interrupt_stubborn
          ignored_signal suspend killed timeout output_closed bind
          many_ranks options)
    add_test(NAME launcher_${case}
             COMMAND ${CMAKE_CURRENT_LIST_DIR}/launcher_test.sh
                     $<TARGET_FILE:epx-run> ${case})
    set_tests_properties(launcher_${case} PROPERTIES
                         TIMEOUT 120 SKIP_RETURN_CODE 77)
  endforeach()
endif()
