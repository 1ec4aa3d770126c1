/* The smallest device on libvfio-user, to show how the library itself treats its client: vmmblk is not in it.
 *
 * Usage: library_server SOCKET. Prints a line once it listens, and serves one client after another until it is killed.
 * Four MSI-X vectors, one INTx, DMA, and a region 0 of 16 bytes: a 32-bit write at 0 triggers that vector, and a read
 * there gives the errno of the last trigger; a read at 4 gives how often close() was called for what was not open; a
 * read of one byte at 8 gives the last byte of the DMA region that was mapped last. Region 1 has 20 bytes and an ioeventfd
 * for each.
 *
 * Linked with --wrap=close, so that the library's calls of close() come here. */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include <vfio-user/libvfio-user.h>

static vfu_dma_info_t newest;
static uint32_t trigger_errno;
static uint32_t bad_closes;

int __real_close(int fd);
int __wrap_close(int fd);

int __wrap_close(int fd)
{
	int result = __real_close(fd);

	if (result == -1 && errno == EBADF)
		bad_closes++;
	return result;
}

static ssize_t access_region(vfu_ctx_t *ctx, char *data, size_t count, loff_t offset, bool is_write)
{
	uint32_t vector;

	if (offset == 8 && count == 1 && !is_write) {
		*data = ((char *)newest.vaddr)[newest.iova.iov_len - 1];
	} else if (count != sizeof(uint32_t)) {
		errno = EINVAL;
		return -1;
	} else if (is_write) {
		memcpy(&vector, data, sizeof(vector));
		trigger_errno = vfu_irq_trigger(ctx, vector) == 0 ? 0 : errno;
	} else {
		memcpy(data, offset == 0 ? &trigger_errno : &bad_closes, count);
	}
	return count;
}

static void map(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
	(void)ctx;
	newest = *info;
}

static void unmap(vfu_ctx_t *ctx, vfu_dma_info_t *info)
{
	(void)ctx;
	(void)info;
}

static int offer_ioeventfds(vfu_ctx_t *ctx)
{
	if (vfu_setup_region(ctx, VFU_PCI_DEV_BAR1_REGION_IDX, 20, access_region, VFU_REGION_FLAG_RW, NULL, 0, -1, 0) < 0)
		return -1;
	for (size_t at = 0; at < 20; at++)
		if (vfu_create_ioeventfd(ctx, VFU_PCI_DEV_BAR1_REGION_IDX, eventfd(0, EFD_CLOEXEC), at, 1, 0, 0) < 0)
			return -1;
	return 0;
}

static void wait_for(vfu_ctx_t *ctx)
{
	struct pollfd fd = { .fd = vfu_get_poll_fd(ctx), .events = POLLIN };

	poll(&fd, 1, -1);
}

int main(int argc, char **argv)
{
	vfu_ctx_t *ctx;

	if (argc != 2)
		return 2;
	ctx = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], LIBVFIO_USER_FLAG_ATTACH_NB, NULL, VFU_DEV_TYPE_PCI);
	if (ctx == NULL || vfu_pci_init(ctx, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) < 0 ||
	    vfu_setup_region(ctx, VFU_PCI_DEV_BAR0_REGION_IDX, 16, access_region, VFU_REGION_FLAG_RW, NULL, 0, -1, 0) < 0 ||
	    offer_ioeventfds(ctx) < 0 || vfu_setup_device_nr_irqs(ctx, VFU_DEV_INTX_IRQ, 1) < 0 ||
	    vfu_setup_device_nr_irqs(ctx, VFU_DEV_MSIX_IRQ, 4) < 0 ||
	    vfu_setup_device_dma(ctx, map, unmap) < 0 || vfu_realize_ctx(ctx) < 0) {
		perror("library_server");
		return 1;
	}
	puts("listening");
	fflush(stdout);
	for (;;) {
		wait_for(ctx);
		if (vfu_attach_ctx(ctx) < 0)
			continue;
		while (vfu_run_ctx(ctx) >= 0 || errno != ENOTCONN)
			wait_for(ctx);
	}
}
