/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A fault that blocks takes a slot, and only then says until when it may: who watches must not take it for late meanwhile. */
#define _GNU_SOURCE
#include "frontend/pager_int.h"

#include "base/clock.h"
#include "frontend/uffd.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

static void a_free_slot_has_all_the_time(void **state)
{
	const struct far_member_conf conf = { .source = "nothing", .deadline = FAR_SEC };
	struct far_receivers *v;
	struct far_member *x;
	struct far_error err;

	assert_int_equal(far_receivers_get(far_uffd_have(), &v, &err), 0);
	assert_int_equal(far_member_add(v, &conf, &x), 0);
	for (int k = 0; k < PAGER_SLOTS; k++) {
		assert_int_equal(x->slot[k].off1, 0);
		assert_true(x->slot[k].until == FAR_NEVER);
	}
	far_member_remove(x);
	far_receivers_put(v);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(a_free_slot_has_all_the_time) };

	if (!(far_uffd_have() & FAR_UFFD_ANY)) {
		printf("no userfaultfd here\n");
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
