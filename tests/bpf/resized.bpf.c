// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* The fast path of somebody who has changed a bound and forgotten that this is another layout: more nodes. */
#include "limits.h"
#undef HF_NODES_MAX
#define HF_NODES_MAX 8192

#include "lb.bpf.c"
