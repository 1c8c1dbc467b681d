# SPDX-License-Identifier: MIT
# The launcher needs the public header's limits, but not the library.
add_executable(epx-run epx_run.c epx_run_hosts.c epx_run_job.c epx_run_output.c
                       epx_run_start.c)
target_include_directories(epx-run PRIVATE ${PROJECT_SOURCE_DIR}/include)
