# SPDX-License-Identifier: MIT
foreach(source
    bootstrap env_bootstrap handshake io join_connect join_listen launch_env link
    net rendezvous resolve secret star star_leaf star_root threads)
  target_sources(epx_objects PRIVATE
    ${CMAKE_CURRENT_SOURCE_DIR}/bootstrap/${source}.c)
endforeach()
