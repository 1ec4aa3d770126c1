/*
 * libvfio-user as vmmblk uses it: one device, one client at a time, a thread of its own.
 *
 * libvfio-user is single-threaded.  Every call on a context happens on the transport thread, except for raising an
 * interrupt, which any thread may do: that is what the lock is for.  The transport thread holds it while it is inside
 * the library; the library's callbacks run with it held and do not take it again.  It is never waited for with the
 * interpreter's lock held (cffi lets that go around every call).
 */
#ifndef VMMBLK_VFU_H
#define VMMBLK_VFU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vmm_vfu;

struct vmm_vfu_layout {
	uint32_t vectors;		/* MSI-X */
	uint64_t bar_size[6];
	uint32_t doorbell_bar;
	uint64_t doorbell_offset;	/* queue n's doorbell is at offset + n * stride */
	uint32_t doorbell_stride;
	uint32_t nr_queues;
	uint64_t mapped_size;		/* bytes of that BAR, from doorbell_offset on, that a client may map; or 0 */
	int32_t mapped_fd;		/* what it maps then: a file as long as the BAR, the caller's */
};

struct vmm_vfu *vmm_vfu_new(const char *path, void *handle, const struct vmm_vfu_layout *layout, int *error);
void vmm_vfu_free(struct vmm_vfu *v);
int vmm_vfu_offer_bells(struct vmm_vfu *v, const int *fds);
void vmm_vfu_set_kick(struct vmm_vfu *v, uint32_t queue, int fd);
void vmm_vfu_set_notify_id(struct vmm_vfu *v, uint32_t queue, int id);
int vmm_vfu_attach(struct vmm_vfu *v);
int vmm_vfu_run(struct vmm_vfu *v);
int vmm_vfu_quiesced(struct vmm_vfu *v);
int vmm_vfu_poll_fd(struct vmm_vfu *v);
int vmm_vfu_listen_fd(const struct vmm_vfu *v);
bool vmm_vfu_shutdown(struct vmm_vfu *v);
void vmm_vfu_trigger(void *v, uint32_t vector);
uint64_t vmm_vfu_trigger_address(void);
uint32_t vmm_vfu_api_minor(void);

/* Implemented in Python (vfio_user.py).  Those that return int or int64_t: -1 with errno set on failure. */
int64_t vmmblk_on_region(void *handle, int region, char *buf, size_t count, uint64_t offset, bool is_write);
int vmmblk_on_quiesce(void *handle);
int vmmblk_on_reset(void *handle, int lost_connection);
void vmmblk_on_dma_map(void *handle, uint64_t iova, uint64_t size, uint64_t vaddr, uint64_t map_base, uint64_t map_len,
		       uint64_t page_size, uint32_t prot);
void vmmblk_on_dma_unmap(void *handle, uint64_t iova, uint64_t size);
void vmmblk_on_intx_unmask(void *handle);
void vmmblk_on_log(void *handle, int level, const char *message);

#endif
