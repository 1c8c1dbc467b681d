/* SPDX-License-Identifier: MIT */
#ifndef TESTS_CONFORMANCE_ROUTING_FILE_H
#define TESTS_CONFORMANCE_ROUTING_FILE_H

#include "conformance/shape.h"

/*
 * Reads the *.csv files of a folder, in the order of their names, at most
 * max_files; the caller frees their topk_idx.  A file starts with '#' comments,
 * one of which tells num_experts=E and top_k=K, then has a line of column names
 * and one line for each token: K expert indices, then K weights.  Returns how
 * many there are, 0 when there is no such folder; -1, with a message, when a
 * file is not like that.
 */
int routing_files_read(const char *folder, routing_file_t *files,
                       int max_files);

#endif
