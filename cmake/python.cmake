# SPDX-License-Identifier: MIT
# What a wheel of the Python packages holds besides Python (pyproject.toml): the
# libraries, under the names by which they find each other, since a wheel knows
# no links.
if(NOT EPX_PYTHON)
  return()
endif()

set(epx_python_libraries epx)
if(TARGET epx_cuda)
  list(APPEND epx_python_libraries epx_cuda)
endif()
foreach(library IN LISTS epx_python_libraries)
  set_target_properties(${library} PROPERTIES
                        BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  install(PROGRAMS $<TARGET_FILE:${library}> DESTINATION epx
          RENAME lib${library}.so.0 COMPONENT python)
endforeach()
