# SPDX-License-Identifier: MIT
set(bootstrap ${PROJECT_SOURCE_DIR}/src/bootstrap)
set(corpus ${CMAKE_CURRENT_SOURCE_DIR}/corpus)
epx_fuzz_target(bootstrap_handshake_fuzz ${corpus}/rendezvous/handshake
                bootstrap_handshake_fuzz.c ${bootstrap}/handshake.c)
epx_fuzz_target(bootstrap_frames_fuzz ${corpus}/rendezvous/frames
                bootstrap_frames_fuzz.c ${bootstrap}/link.c ${bootstrap}/star.c
                ${bootstrap}/star_leaf.c ${bootstrap}/star_root.c)
epx_fuzz_target(bootstrap_environment_fuzz ${corpus}/environment
                bootstrap_environment_fuzz.c ${bootstrap}/launch_env.c)
