# SPDX-License-Identifier: MIT
# What `cmake --install` puts where, and how it is found again.  Nothing that is
# installed holds an absolute path, so the tree may be moved.

add_library(epx::epx ALIAS epx)
add_library(epx::epx_static ALIAS epx_static)

# Two sets of targets, so that a program that takes the shared library does not
# need the development files of what only the static one asks for.
set(epx_cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/epx)
install(TARGETS epx EXPORT epx-targets
        LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
if(TARGET epx_cuda)
  install(TARGETS epx_cuda
          LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} NAMELINK_SKIP)
endif()
install(TARGETS epx_static EXPORT epx-static-targets
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(EXPORT epx-targets NAMESPACE epx:: DESTINATION ${epx_cmake_dir})
install(EXPORT epx-static-targets NAMESPACE epx::
        DESTINATION ${epx_cmake_dir})
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/epx-config.cmake.in
  ${PROJECT_BINARY_DIR}/epx-config.cmake
  INSTALL_DESTINATION ${epx_cmake_dir})
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/epx-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/epx-config.cmake
              ${PROJECT_BINARY_DIR}/epx-config-version.cmake
        DESTINATION ${epx_cmake_dir})

file(RELATIVE_PATH epx_pc_to_prefix
     ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
string(REGEX REPLACE "/$" "" epx_pc_to_prefix "${epx_pc_to_prefix}")
file(RELATIVE_PATH epx_prefix_to_lib
     ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH epx_prefix_to_include
     ${CMAKE_INSTALL_PREFIX} ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(${PROJECT_SOURCE_DIR}/cmake/epx.pc.in
               ${PROJECT_BINARY_DIR}/epx.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/epx.pc
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/epx
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h")

file(RELATIVE_PATH epx_bin_to_lib
     ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
foreach(tool epx-run epx-info epx-bench)
  if(TARGET ${tool})
    set_target_properties(${tool} PROPERTIES
                          INSTALL_RPATH "$ORIGIN/${epx_bin_to_lib}")
    install(TARGETS ${tool} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
    install(FILES ${PROJECT_SOURCE_DIR}/docs/man/${tool}.1
            DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
  endif()
endforeach()
