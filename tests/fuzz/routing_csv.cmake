# SPDX-License-Identifier: MIT
epx_fuzz_target(fuzz_routing_csv ${CMAKE_CURRENT_SOURCE_DIR}/corpus/routing_csv
                routing_csv_fuzz.c
                ${PROJECT_SOURCE_DIR}/tools/bench/routing_csv.c)
target_include_directories(fuzz_routing_csv
                           PRIVATE ${PROJECT_SOURCE_DIR}/tools/bench)
