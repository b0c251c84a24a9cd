/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Sending straight from a store's own pages, where it is memory: what is being sent is on loan. */
#ifndef FAR_LOANS_H
#define FAR_LOANS_H

#include "base/thread.h"

struct far_backend;
struct far_loans;

struct far_loan {
	struct far_loans *of; /* NULL: not on loan */
	uint64_t off, len;
	bool late; /* a change has not waited any longer */
	struct far_loan *next, **prev;
};

/* NULL: the backend is no memory that can be lent, or there is none for this; its bytes are copied then. */
struct far_loans *far_loans_new(struct far_backend *b);
/* Nothing is on loan. NULL is fine. */
void far_loans_free(struct far_loans *l);

/* Where the bytes are, until far_loan_return(); NULL: copy them. l may be NULL. */
const void *far_loan_take(struct far_loans *l, uint64_t off, size_t len, struct far_loan *loan);
void far_loan_return(struct far_loan *loan); /* what is not on loan is left alone */
/* A peer has got other bytes than were summed: lend nothing for a while. */
void far_loans_doubt(struct far_loans *l);

/* Around each change: nothing in its range is on loan in between, and nothing at all is lent meanwhile. -EAGAIN, if not
 * `wait`: it would have to wait. */
int far_loans_change_begin(struct far_loans *l, uint64_t off, uint64_t len, bool wait);
void far_loans_change_end(struct far_loans *l);

#endif
