# SPDX-License-Identifier: MIT
# The reference of --check judges the library here just as it does in the tests,
# which add it themselves.
if(NOT EPX_BUILD_TESTS AND NOT TARGET epx_oracle)
  add_subdirectory(${PROJECT_SOURCE_DIR}/tests/oracle
                   ${PROJECT_BINARY_DIR}/tests/oracle)
endif()

# All but main, which the tests use too.
find_package(Threads REQUIRED)
add_library(epx_bench_parts STATIC
  bench/bench_barrier.c
  bench/bench_check.c
  bench/bench_copy.c
  bench/bench_data.c
  bench/bench_help.c
  bench/bench_launch.c
  bench/bench_link.c
  bench/bench_measure.c
  bench/bench_nccl.c
  bench/bench_nccl_library.c
  bench/bench_op.c
  bench/bench_options.c
  bench/bench_peer.c
  bench/bench_rank.c
  bench/bench_report.c
  bench/bench_routing.c
  bench/bench_run.c
  bench/bench_shape.c
  bench/bench_soak.c
  bench/bench_time_card.c
  bench/bench_times.c
  bench/routing_csv.c)
target_include_directories(epx_bench_parts
                           PUBLIC ${CMAKE_CURRENT_SOURCE_DIR}/bench)
target_link_libraries(epx_bench_parts PUBLIC epx epx_oracle Threads::Threads m
                                      PRIVATE ${CMAKE_DL_LIBS})
if(TARGET epx_cuda) # CUDA's runtime becomes part of the program
  find_package(CUDAToolkit REQUIRED QUIET)
  epx_cuda_compile(bench_objects ${CMAKE_CURRENT_SOURCE_DIR}/bench/bench_signals.cu)
  target_sources(epx_bench_parts PRIVATE bench/bench_cuda.c ${bench_objects})
  target_link_libraries(epx_bench_parts PRIVATE CUDA::cudart_static)
else()
  target_sources(epx_bench_parts PRIVATE bench/bench_cuda_none.c)
endif()

if(UCX_INCLUDE_DIR AND EPX_UCX)
  target_sources(epx_bench_parts PRIVATE bench/bench_ucx.c
                                         bench/bench_ucx_library.c)
  target_include_directories(epx_bench_parts SYSTEM PRIVATE ${UCX_INCLUDE_DIR})
else()
  target_sources(epx_bench_parts PRIVATE bench/bench_ucx_none.c)
endif()

add_executable(epx-bench bench/epx_bench.c)
target_link_libraries(epx-bench PRIVATE epx_bench_parts)

# What --vs mpi runs, where MPI's C compiler wrapper is found.  Sanitizers would
# judge the MPI library, not this program.
find_package(MPI QUIET COMPONENTS C)
if(MPI_C_FOUND)
  add_executable(epx-bench-mpi-peer
    bench/mpi_peer.c
    bench/mpi_peer_check.c
    bench/mpi_peer_move.c
    bench/mpi_peer_open.c
    bench/mpi_peer_sum.c
    bench/bench_times.c)
  target_include_directories(epx-bench-mpi-peer
                             PRIVATE ${PROJECT_SOURCE_DIR}/include)
  target_link_libraries(epx-bench-mpi-peer PRIVATE MPI::MPI_C m)
  if(EPX_SANITIZE)
    target_compile_options(epx-bench-mpi-peer PRIVATE -fno-sanitize=all)
    target_link_options(epx-bench-mpi-peer PRIVATE -fno-sanitize=all)
  endif()
  install(TARGETS epx-bench-mpi-peer
          RUNTIME DESTINATION ${CMAKE_INSTALL_LIBEXECDIR}/epx)
endif()
message(STATUS "epx-bench: MPI peer ${MPI_C_FOUND}")
