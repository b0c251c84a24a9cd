/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What linux/userfaultfd.h and linux/fs.h of 6.18 define and those of 6.1 do not. Names of our own, so that newer headers
 * do not clash; numbers and layouts are the kernel's ABI. */
#ifndef FAR_UFFD_ABI_H
#define FAR_UFFD_ABI_H

#include <linux/types.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>

#define FAR_UFFD_DEV_NEW _IO(0xAA, 0x00) /* of /dev/userfaultfd (6.1) */

#define FAR_FEATURE_WP_SHMEM ((__u64)1 << 12) /* 5.19 */
#define FAR_FEATURE_POISON ((__u64)1 << 14)   /* 6.6 */
#define FAR_FEATURE_WP_ASYNC ((__u64)1 << 15) /* 6.7 */
#define FAR_FEATURE_MOVE ((__u64)1 << 16)     /* 6.8 */

#define FAR_CONTINUE_MODE_WP ((__u64)1 << 1) /* 6.4 */

struct far_uffdio_move {
	__u64 dst, src, len, mode;
	__s64 move; /* written by the kernel */
};
#define FAR_UFFDIO_MOVE _IOWR(0xAA, 0x05, struct far_uffdio_move)
#define FAR_MOVE_MODE_DONTWAKE ((__u64)1 << 0)
#define FAR_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1 << 1)

struct far_uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated; /* written by the kernel */
};
#define FAR_UFFDIO_POISON _IOWR(0xAA, 0x08, struct far_uffdio_poison)

/* PAGEMAP_SCAN (6.7) */
struct far_page_region {
	__u64 start, end, categories;
};
struct far_pm_scan_arg {
	__u64 size, flags, start, end;
	__u64 walk_end; /* written by the kernel */
	__u64 vec, vec_len, max_pages;
	__u64 category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define FAR_PAGEMAP_SCAN _IOWR('f', 16, struct far_pm_scan_arg)
#define FAR_SCAN_WP_MATCHING ((__u64)1 << 0)
#define FAR_SCAN_CHECK_WPASYNC ((__u64)1 << 1)
#define FAR_PAGE_WRITTEN ((__u64)1 << 1)
#define FAR_PAGE_PRESENT ((__u64)1 << 3)
#define FAR_PAGE_SWAPPED ((__u64)1 << 4)
#define FAR_PAGE_PFNZERO ((__u64)1 << 5)
#define FAR_PAGE_HUGE ((__u64)1 << 6)

/* An entry of /proc/PID/pagemap */
#define FAR_PM_SWAP ((__u64)1 << 62)
#define FAR_PM_PRESENT ((__u64)1 << 63)

#endif
