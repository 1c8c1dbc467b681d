# SPDX-License-Identifier: MIT
set(EPX_UCX AUTO CACHE STRING
    "other hosts by UCX: ON, OFF, or AUTO where its headers are found")
set_property(CACHE EPX_UCX PROPERTY STRINGS AUTO ON OFF)

foreach(source beat box bundle check end group interface meet open put receive renew
    ring send submit thread wait)
  target_sources(epx_objects PRIVATE
    ${CMAKE_CURRENT_SOURCE_DIR}/net/net_${source}.c)
endforeach()

# Only the headers: the library is loaded when it is asked for.
set(epx_ucx_headers NO)
if(EPX_UCX)
  find_path(UCX_INCLUDE_DIR ucp/api/ucp.h)
  if(UCX_INCLUDE_DIR)
    set(epx_ucx_headers YES)
  elseif(NOT EPX_UCX STREQUAL AUTO)
    message(FATAL_ERROR "EPX_UCX is ${EPX_UCX}, but UCX's headers were not found "
                        "(libucx-dev; UCX_INCLUDE_DIR tells where)")
  endif()
endif()
if(epx_ucx_headers)
  set(ucx_sources ucx_backend.c ucx_card.c ucx_greet.c ucx_library.c ucx_puts.c
      ucx_settings.c)
  target_include_directories(epx_objects SYSTEM PRIVATE ${UCX_INCLUDE_DIR})
  target_link_libraries(epx_objects PUBLIC ${CMAKE_DL_LIBS})
  message(STATUS "UCX: headers in ${UCX_INCLUDE_DIR}")
else()
  set(ucx_sources ucx_none.c)
  message(STATUS "UCX: left out, other hosts cannot be reached")
endif()
foreach(source IN LISTS ucx_sources)
  target_sources(epx_objects PRIVATE
    ${CMAKE_CURRENT_SOURCE_DIR}/net/ucx/${source})
endforeach()
