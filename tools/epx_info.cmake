# SPDX-License-Identifier: MIT
add_executable(epx-info epx_info.c epx_info_report.c epx_info_system.c)
target_link_libraries(epx-info PRIVATE epx ${CMAKE_DL_LIBS})
