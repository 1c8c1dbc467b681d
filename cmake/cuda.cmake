# SPDX-License-Identifier: MIT
# The module for CUDA, libepx_cuda.so, which libepx.so loads when a card is
# asked for.  The kernels are compiled by nvcc itself, so that neither CMake's
# CUDA language nor a C++ compiler of its own has to work.
set(EPX_CUDA AUTO CACHE STRING
    "the module for CUDA: ON, OFF, or AUTO where a toolkit is found")
set_property(CACHE EPX_CUDA PROPERTY STRINGS AUTO ON OFF)
set(EPX_CUDA_ARCHS "80;90;100" CACHE STRING
    "compute capabilities to compile for; the last one as PTX, too")

set(epx_cuda_dir ${PROJECT_SOURCE_DIR}/src/engine/cuda)
if(NOT EPX_CUDA OR NOT EXISTS ${epx_cuda_dir}/cuda_engine.c)
  return()
endif()

# Where scripts/setup --cuda puts one, unless the machine has its own.
set(venv_cuda ${PROJECT_SOURCE_DIR}/.venv/cuda/nvidia/cu13)
find_package(CUDAToolkit 12.8 QUIET)
if(NOT CUDAToolkit_FOUND AND NOT CUDAToolkit_ROOT AND EXISTS ${venv_cuda})
  set(CUDAToolkit_ROOT ${venv_cuda} CACHE PATH "the CUDA toolkit")
  find_package(CUDAToolkit 12.8 QUIET)
endif()
if(NOT CUDAToolkit_NVCC_EXECUTABLE OR NOT TARGET CUDA::cudart_static)
  if(EPX_CUDA STREQUAL AUTO)
    message(STATUS "CUDA: left out, no toolkit of version 12.8 or later was "
                   "found (scripts/setup --cuda gets one)")
    return()
  endif()
  message(FATAL_ERROR "EPX_CUDA is ${EPX_CUDA}, but no CUDA toolkit of version "
                      "12.8 or later was found (CUDAToolkit_ROOT tells where)")
endif()
message(STATUS "CUDA: ${CUDAToolkit_VERSION} for ${EPX_CUDA_ARCHS}, "
               "by ${CUDAToolkit_NVCC_EXECUTABLE}")

# Results are the same bits as those of C: no contraction of a * b + c.
set(epx_nvcc_flags
  -std=c++17 -O3 -fmad=false -lineinfo --expt-relaxed-constexpr
  -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/src
  -Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti
  -Xcompiler=-fno-threadsafe-statics,-ffp-contract=off,-Wall,-Wextra)
foreach(arch IN LISTS EPX_CUDA_ARCHS)
  list(APPEND epx_nvcc_flags -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
list(GET EPX_CUDA_ARCHS -1 arch)
list(APPEND epx_nvcc_flags -gencode=arch=compute_${arch},code=compute_${arch})
if(EPX_WERROR)
  list(APPEND epx_nvcc_flags -Werror=all-warnings -Xcompiler=-Werror)
endif()

set_property(GLOBAL PROPERTY EPX_NVCC_FLAGS "${epx_nvcc_flags}")

# epx_cuda_compile(OBJECTS KERNEL...): the objects of these files, for a target
# of the same directory.
function(epx_cuda_compile objects)
  get_property(flags GLOBAL PROPERTY EPX_NVCC_FLAGS)
  set(made)
  foreach(kernel IN LISTS ARGN)
    get_filename_component(name ${kernel} NAME)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${flags} -c ${kernel} -o ${object}
              -MD -MF ${object}.d
      DEPENDS ${kernel}
      DEPFILE ${object}.d
      COMMENT "Compiling ${name} for ${EPX_CUDA_ARCHS}"
      COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND made ${object})
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/cuda)
  set(${objects} ${made} PARENT_SCOPE)
endfunction()

file(GLOB epx_cuda_kernels CONFIGURE_DEPENDS ${epx_cuda_dir}/*.cu)
epx_cuda_compile(epx_cuda_objects ${epx_cuda_kernels})

file(GLOB epx_cuda_sources CONFIGURE_DEPENDS
     ${epx_cuda_dir}/*.c ${PROJECT_SOURCE_DIR}/src/fabric/cuda/*.c)
add_library(epx_cuda SHARED ${epx_cuda_sources} ${epx_cuda_objects})
target_include_directories(epx_cuda PRIVATE ${PROJECT_SOURCE_DIR}/src)
target_link_libraries(epx_cuda PRIVATE epx CUDA::cudart_static m)
set(epx_cuda_map ${PROJECT_SOURCE_DIR}/src/epx_cuda.map)
target_link_options(epx_cuda PRIVATE -Wl,--version-script=${epx_cuda_map})
if(NOT EPX_SANITIZE)
  target_link_options(epx_cuda PRIVATE -Wl,--no-undefined)
endif()
set_target_properties(epx_cuda PROPERTIES
  VERSION ${PROJECT_VERSION} SOVERSION 0 LINKER_LANGUAGE C
  LINK_DEPENDS ${epx_cuda_map} INSTALL_RPATH "$ORIGIN")
