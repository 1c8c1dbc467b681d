# SPDX-License-Identifier: MIT
# What a wheel of the Python packages holds besides Python (pyproject.toml): the
# libraries, under the names by which they find each other, since a wheel knows
# no links.
if(NOT EPX_PYTHON)
  return()
endif()

find_package(Threads REQUIRED)
add_library(epx_pool SHARED python/epx_pool.c)
target_link_libraries(epx_pool PRIVATE epx::epx Threads::Threads)

foreach(library epx epx_cuda epx_pool)
  if(TARGET ${library})
    set_target_properties(${library} PROPERTIES
                          BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
    install(PROGRAMS $<TARGET_FILE:${library}> DESTINATION epx
            RENAME lib${library}.so.0 COMPONENT python)
  endif()
endforeach()
