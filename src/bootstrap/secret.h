/* SPDX-License-Identifier: MIT */
/* The job's secret: 32 bytes that every rank of the job holds, and nobody else.
 * It is never part of a sentence, of the log, or of a command line. */
#ifndef EPX_BOOTSTRAP_SECRET_H
#define EPX_BOOTSTRAP_SECRET_H

#include "bootstrap/rendezvous_wire.h"

/* Reads the secret from EPX_SECRET, EPX_SECRET_FILE or the user's own file,
 * which is made when it is not there.  The caller wipes it. */
epx_status_t epx__secret_load(unsigned char secret[EPX__SECRET_BYTES]);

#endif
