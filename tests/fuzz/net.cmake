# SPDX-License-Identifier: MIT
set(net ${PROJECT_SOURCE_DIR}/src/net)
epx_fuzz_target(net_messages_fuzz ${CMAKE_CURRENT_SOURCE_DIR}/corpus/net
                net_messages_fuzz.c ${net}/net_box.c ${net}/net_bundle.c
                ${net}/net_check.c ${net}/net_put.c ${net}/net_receive.c
                ${net}/net_send.c)
