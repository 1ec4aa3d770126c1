/* See vfu.h.  The differences between libvfio-user's API 0.1 and 0.2 end in this file. */
#include "vfu.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <syslog.h>
#include <time.h>
#include <unistd.h>

#include <libvfio-user.h>
#include <pci_defs.h>

#define MAX_QUEUES 64
#define MAX_REGIONS 256		/* as many as the core maps */
#define DOORBELL (1ull << 32)	/* what a doorbell adds to the eventfd; kicks of our own add 1 */
#define DOORBELL_SIZE 2		/* bytes that a driver writes: four are of NOTIFICATION_DATA, and carry more than a kick */
#define LOG_BURST 20		/* messages of the library in a row, then one a second */

struct vmm_vfu {
	vfu_ctx_t *ctx;
	void *handle;
	struct vmm_vfu_layout layout;
	pthread_mutex_t lock;
	atomic_int owner;		/* the thread inside the library, 0 when none */
	int listen_fd;
	atomic_int kick_fds[MAX_QUEUES];
	atomic_int notify_ids[MAX_QUEUES];	/* what a doorbell must carry (NOTIF_CONFIG_DATA); -1: anything */
	bool mute;			/* the library's complaints are of no interest */
	int log_tokens;
	time_t log_time;
};

static int this_thread(void)
{
	return (int)syscall(SYS_gettid);
}

static void enter(struct vmm_vfu *v)
{
	pthread_mutex_lock(&v->lock);
	atomic_store(&v->owner, this_thread());
}

static int leave(struct vmm_vfu *v, int result)
{
	int error = errno;

	atomic_store(&v->owner, 0);
	pthread_mutex_unlock(&v->lock);
	return result < 0 ? -error : result;
}

/* ---- callbacks, all with the lock held --------------------------------------------------------------------------- */

static void on_log(vfu_ctx_t *ctx, int level, const char *message)
{
	struct vmm_vfu *v = vfu_get_private(ctx);
	struct timespec now;

	if (v->mute)
		return;
	/* a client makes the library complain as often as it likes: it gets a burst, then one line a second */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	if (now.tv_sec != v->log_time) {
		time_t earned = now.tv_sec - v->log_time;
		v->log_tokens = earned > LOG_BURST - v->log_tokens ? LOG_BURST : v->log_tokens + (int)earned;
		v->log_time = now.tv_sec;
	}
	if (v->log_tokens <= 0)
		return;
	v->log_tokens--;
	vmmblk_on_log(v->handle, level, message);
}

/* A doorbell ends here, without the interpreter: the queue's eventfd wakes whoever serves it. */
static bool doorbell(struct vmm_vfu *v, int region, const char *buf, size_t count, uint64_t offset)
{
	const struct vmm_vfu_layout *l = &v->layout;

	if (region != (int)l->doorbell_bar || !count || offset < l->doorbell_offset)
		return false;
	uint64_t queue = (offset - l->doorbell_offset) / l->doorbell_stride;
	if (queue >= l->nr_queues)
		return false;
	int fd = atomic_load(&v->kick_fds[queue]), id = atomic_load(&v->notify_ids[queue]);
	if (fd >= 0 && (id < 0 || (count >= 2 && id == ((uint8_t)buf[0] | (uint8_t)buf[1] << 8))))
		eventfd_write(fd, DOORBELL);
	return true;
}

static ssize_t on_region(vfu_ctx_t *ctx, int region, char *buf, size_t count, loff_t offset, bool is_write)
{
	struct vmm_vfu *v = vfu_get_private(ctx);

	if (is_write && doorbell(v, region, buf, count, (uint64_t)offset))
		return (ssize_t)count;
	return vmmblk_on_region(v->handle, region, buf, count, (uint64_t)offset, is_write);
}

#define REGION_CALLBACK(name, index) \
	static ssize_t name(vfu_ctx_t *ctx, char *buf, size_t count, loff_t offset, bool is_write) \
	{ \
		return on_region(ctx, index, buf, count, offset, is_write); \
	}

REGION_CALLBACK(on_bar0, VFU_PCI_DEV_BAR0_REGION_IDX)
REGION_CALLBACK(on_bar1, VFU_PCI_DEV_BAR1_REGION_IDX)
REGION_CALLBACK(on_bar2, VFU_PCI_DEV_BAR2_REGION_IDX)
REGION_CALLBACK(on_bar3, VFU_PCI_DEV_BAR3_REGION_IDX)
REGION_CALLBACK(on_bar4, VFU_PCI_DEV_BAR4_REGION_IDX)
REGION_CALLBACK(on_bar5, VFU_PCI_DEV_BAR5_REGION_IDX)
REGION_CALLBACK(on_config, VFU_PCI_DEV_CFG_REGION_IDX)

static int on_quiesce(vfu_ctx_t *ctx)
{
	return vmmblk_on_quiesce(((struct vmm_vfu *)vfu_get_private(ctx))->handle);
}

static int on_reset(vfu_ctx_t *ctx, vfu_reset_type_t type)
{
	return vmmblk_on_reset(((struct vmm_vfu *)vfu_get_private(ctx))->handle, type == VFU_RESET_LOST_CONN);
}

static void on_dma_register(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
	struct vmm_vfu *v = vfu_get_private(ctx);

	vmmblk_on_dma_map(v->handle, (uintptr_t)info->iova.iov_base, info->iova.iov_len, (uintptr_t)info->vaddr,
			  (uintptr_t)info->mapping.iov_base, info->mapping.iov_len, info->page_size, info->prot);
}

static void on_dma_unregister(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
	struct vmm_vfu *v = vfu_get_private(ctx);

	vmmblk_on_dma_unmap(v->handle, (uintptr_t)info->iova.iov_base, info->iova.iov_len);
}

static void on_intx_state(vfu_ctx_t *ctx, uint32_t start, uint32_t count, bool mask)
{
	(void)start;
	(void)count;
	if (!mask)
		vmmblk_on_intx_unmask(((struct vmm_vfu *)vfu_get_private(ctx))->handle);
}

/* ---- setting up -------------------------------------------------------------------------------------------------- */

static int setup_dma(vfu_ctx_t *ctx)
{
#if LIB_VFIO_USER_MINOR >= 2
	return vfu_setup_device_dma(ctx, MAX_REGIONS, on_dma_register, on_dma_unregister);
#else
	return vfu_setup_device_dma(ctx, on_dma_register, on_dma_unregister);
#endif
}

static int setup_regions(vfu_ctx_t *ctx, const struct vmm_vfu_layout *layout)
{
	static vfu_region_access_cb_t *const bars[6] = { on_bar0, on_bar1, on_bar2, on_bar3, on_bar4, on_bar5 };

	struct iovec area = { (void *)(uintptr_t)layout->doorbell_offset, layout->mapped_size };

	for (int i = 0; i < 6; i++) {
		bool mapped = layout->mapped_size && i == (int)layout->doorbell_bar;
		if (layout->bar_size[i] &&
		    vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX + i, layout->bar_size[i], bars[i],
				     VFU_REGION_FLAG_RW | VFU_REGION_FLAG_MEM, mapped ? &area : NULL, mapped,
				     mapped ? layout->mapped_fd : -1, 0) < 0)
			return -1;
	}
	/* after vfu_pci_init(), which would set the region up again: all of config space is ours */
	return vfu_setup_region(ctx, VFU_PCI_DEV_CFG_REGION_IDX, PCI_CFG_SPACE_SIZE, on_config,
				VFU_REGION_FLAG_RW | VFU_REGION_FLAG_ALWAYS_CB, NULL, 0, -1, 0);
}

static int setup(vfu_ctx_t *ctx, const struct vmm_vfu_layout *layout)
{
	if (vfu_setup_log(ctx, on_log, LOG_ERR) < 0 ||
	    vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0 ||
	    setup_regions(ctx, layout) < 0 || setup_dma(ctx) < 0 ||
	    vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) < 0 ||
	    vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSIX_IRQ, layout->vectors) < 0 ||
	    vfu_setup_irq_state_callback(ctx, VFU_DEV_INTX_IRQ, on_intx_state) < 0 ||
	    vfu_setup_device_reset_cb(ctx, on_reset) < 0)
		return -1;
	vfu_setup_device_quiesce_cb(ctx, on_quiesce);
	return vfu_realize_ctx(ctx);
}

/* Bind the socket and set the device up.  handle goes to every callback.  NULL with *error on failure. */
struct vmm_vfu *vmm_vfu_new(const char *path, void *handle, const struct vmm_vfu_layout *layout, int *error)
{
	struct vmm_vfu *v = calloc(1, sizeof(*v));

	if (!v || layout->nr_queues > MAX_QUEUES || !layout->doorbell_stride) {
		*error = v ? EINVAL : ENOMEM;
		free(v);
		return NULL;
	}
	v->handle = handle;
	v->layout = *layout;
	pthread_mutex_init(&v->lock, NULL);
	for (int i = 0; i < MAX_QUEUES; i++) {
		atomic_store(&v->kick_fds[i], -1);
		atomic_store(&v->notify_ids[i], -1);
	}
	v->ctx = vfu_create_ctx(VFU_TRANS_SOCK, path, LIBVFIO_USER_FLAG_ATTACH_NB, v, VFU_DEV_TYPE_PCI);
	if (!v->ctx || setup(v->ctx, layout) < 0) {
		*error = errno;
		vmm_vfu_free(v);
		return NULL;
	}
	v->listen_fd = vfu_get_poll_fd(v->ctx);
	return v;
}

/* Closes the connection and the socket; guest memory is unmapped through the callbacks. */
void vmm_vfu_free(struct vmm_vfu *v)
{
	if (v->ctx) {
		enter(v);
		vfu_destroy_ctx(v->ctx);
		leave(v, 0);
	}
	pthread_mutex_destroy(&v->lock);
	free(v);
}

static int offer_bell(struct vmm_vfu *v, uint32_t queue, int fd)
{
	uint64_t offset = v->layout.doorbell_offset + (uint64_t)queue * v->layout.doorbell_stride;

#if LIB_VFIO_USER_MINOR >= 2
	return vfu_create_ioeventfd(v->ctx, v->layout.doorbell_bar, fd, offset, DOORBELL_SIZE, 0, 0, -1, 0);
#else
	return vfu_create_ioeventfd(v->ctx, v->layout.doorbell_bar, fd, offset, DOORBELL_SIZE, 0, 0);
#endif
}

/*
 * Give clients that ask for them (GET_REGION_IO_FDS) these eventfds, one for each queue, to write instead of sending
 * doorbells.  Once, before vmm_vfu_attach().  What has these numbers when a client asks is what it gets.
 */
int vmm_vfu_offer_bells(struct vmm_vfu *v, const int *fds)
{
	int error = 0;

	enter(v);
	/* the library puts each before the others, and the first queues matter most to who cannot take all of them */
	for (uint32_t i = v->layout.nr_queues; i-- > 0 && !error;)
		error = offer_bell(v, i, fds[i]);
	return leave(v, error);
}

void vmm_vfu_set_kick(struct vmm_vfu *v, uint32_t queue, int fd)
{
	if (queue < MAX_QUEUES)
		atomic_store(&v->kick_fds[queue], fd);
}

/* Doorbells of the queue must carry id in their low 16 bits, or are ignored; -1: whatever they carry. */
void vmm_vfu_set_notify_id(struct vmm_vfu *v, uint32_t queue, int id)
{
	if (queue < MAX_QUEUES)
		atomic_store(&v->notify_ids[queue], id);
}

/* ---- the transport thread ---------------------------------------------------------------------------------------- */

/* Accept a client and negotiate.  -EAGAIN: nobody there. */
int vmm_vfu_attach(struct vmm_vfu *v)
{
	enter(v);
	return leave(v, vfu_attach_ctx(v->ctx));
}

/*
 * Handle one message: 1 handled, 0 none there (or refused), -ENOTCONN the client is gone, -EBUSY: it waits for
 * vmm_vfu_quiesced().
 */
int vmm_vfu_run(struct vmm_vfu *v)
{
	enter(v);
	return leave(v, vfu_run_ctx(v->ctx));
}

/* The device is quiescent: the message that waited is handled.  Never with an error, which would drop it unanswered. */
int vmm_vfu_quiesced(struct vmm_vfu *v)
{
	enter(v);
	return leave(v, vfu_device_quiesced(v->ctx, 0));
}

/* What to poll: the connection, or the listening socket while there is none. */
int vmm_vfu_poll_fd(struct vmm_vfu *v)
{
	return vfu_get_poll_fd(v->ctx);
}

int vmm_vfu_listen_fd(const struct vmm_vfu *v)
{
	return v->listen_fd;
}

/*
 * From any thread: break the connection, if there is one.  It frees the transport thread from a recv() that a client
 * keeps waiting (half a message), so it does not take the lock; it reads one int of the library's.
 */
bool vmm_vfu_shutdown(struct vmm_vfu *v)
{
	int fd = vfu_get_poll_fd(v->ctx);

	return fd != v->listen_fd && shutdown(fd, SHUT_RDWR) == 0;
}

/* The interrupt sink, from any thread; inside a callback the lock is held already. */
void vmm_vfu_trigger(void *arg, uint32_t vector)
{
	struct vmm_vfu *v = arg;
	bool inside = atomic_load(&v->owner) == this_thread();

	if (!inside)
		pthread_mutex_lock(&v->lock);
	/* no eventfd set up for the vector: there is nobody to tell, and no reason to complain */
	v->mute = true;
	(void)!vfu_irq_trigger(v->ctx, vector);
	v->mute = false;
	if (!inside)
		pthread_mutex_unlock(&v->lock);
}

uint64_t vmm_vfu_trigger_address(void)
{
	return (uintptr_t)vmm_vfu_trigger;
}

uint32_t vmm_vfu_api_minor(void)
{
	return LIB_VFIO_USER_MINOR;
}
