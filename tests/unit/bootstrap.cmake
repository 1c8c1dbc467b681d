# SPDX-License-Identifier: MIT
foreach(behaviour environment handshake launch rendezvous secret star strangers
                  threads)
  epx_test(bootstrap_${behaviour} bootstrap_${behaviour}.c bootstrap_util.c)
  target_link_libraries(bootstrap_${behaviour} PRIVATE epx_world)
endforeach()

find_package(MPI COMPONENTS C QUIET)
if(MPI_C_FOUND)
  add_executable(bootstrap_mpi bootstrap_mpi.c)
  target_link_libraries(bootstrap_mpi PRIVATE epx_internal MPI::MPI_C)
  add_test(NAME bootstrap_mpi
    COMMAND ${MPIEXEC_EXECUTABLE} ${MPIEXEC_NUMPROC_FLAG} 4
            $<TARGET_FILE:bootstrap_mpi>)
  # MPI's own leaks are not ours, and its own threads are not instrumented.
  set_tests_properties(bootstrap_mpi PROPERTIES TIMEOUT 300 ENVIRONMENT
    "OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1;OMPI_MCA_rmaps_base_oversubscribe=1;PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe;ASAN_OPTIONS=detect_leaks=0;TSAN_OPTIONS=ignore_noninstrumented_modules=1:intercept_tls_get_addr=0")
else()
  message(WARNING "no MPI found: the test of epx_mpi.h is skipped")
  add_test(NAME bootstrap_mpi
    COMMAND sh -c "echo 'SKIPPED: built without MPI'; exit 77")
  set_tests_properties(bootstrap_mpi PROPERTIES SKIP_RETURN_CODE 77)
endif()
