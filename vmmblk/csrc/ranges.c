/* What DISCARD and WRITE_ZEROES are told: which sectors, and what that means for a disk that is memory. */
#include "transfer.h"

#include <endian.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define AT_ONCE (16u << 20)		/* what more than so many bytes costs is nothing for a thread that serves a queue */
#define FLAG_UNMAP 1

/* struct virtio_blk_discard_write_zeroes */
struct segment {
	uint64_t sector;
	uint32_t sectors;
	uint32_t flags;
};

/* The guest may be changing it: it is read once. */
static void copy_payload(const struct vmm_chain *c, struct segment *to)
{
	uint32_t n;
	const struct vmm_seg *s = segments(c, true, &n);
	uint8_t *at = (uint8_t *)to;

	for (uint32_t i = 0; i < n; i++) {
		memcpy(at, s[i].host, s[i].len);
		at += s[i].len;
	}
}

static bool understand(const struct vmm_engine *e, const struct segment *segment, uint32_t most, uint32_t flags_allowed,
		       struct range *out)
{
	uint64_t sector = le64toh(segment->sector), size = atomic_load_explicit(&e->size, memory_order_relaxed);
	uint32_t sectors = le32toh(segment->sectors), flags = le32toh(segment->flags);

	if (flags & ~flags_allowed || sectors > most || sector > size / SECTOR || sectors > size / SECTOR - sector)
		return false;
	*out = (struct range){
		.offset = sector * SECTOR, .length = (uint64_t)sectors * SECTOR, .unmap = flags & FLAG_UNMAP,
	};
	return !((out->offset | out->length) & (e->target.sector_size - 1));
}

/*
 * The ranges, at most RANGES_MAX, without those that are empty; how many, or -1 if not every one is plainly good.  All
 * are looked at before the first is touched.
 */
int ranges_understand(const struct vmm_engine *e, const struct vmm_chain *c, bool discard, struct range *out)
{
	const struct range_limits *limits = discard ? &e->discard : &e->zeroes;
	uint32_t most = atomic_load_explicit(&limits->segments, memory_order_relaxed);
	uint32_t sectors = atomic_load_explicit(&limits->sectors, memory_order_relaxed);
	struct segment payload[RANGES_MAX];
	uint64_t count = c->readable / sizeof(payload[0]);
	int n = 0;

	if (!e->target.writable || !count || c->readable % sizeof(payload[0]) || count > most || count > RANGES_MAX)
		return -1;
	copy_payload(c, payload);
	for (uint64_t i = 0; i < count; i++) {
		if (!understand(e, &payload[i], sectors, discard ? 0 : FLAG_UNMAP, &out[n]))
			return -1;
		n += out[n].length > 0;
	}
	return n;
}

/* Zero it, and give whole pages back to the system. */
static void deallocate(uint8_t *from, uint8_t *to)
{
	uintptr_t page = (uintptr_t)getpagesize();
	uint8_t *first = (uint8_t *)(((uintptr_t)from + page - 1) & ~(page - 1));
	uint8_t *last = (uint8_t *)((uintptr_t)to & ~(page - 1));

	if (first >= last || madvise(first, (size_t)(last - first), MADV_DONTNEED))
		first = last = to;
	memset(from, 0, (size_t)(first - from));
	memset(last, 0, (size_t)(to - last));
}

/* Carry them out; false, and nothing has happened, if that takes long. */
bool ranges_in_memory(const struct vmm_engine *e, const struct range *ranges, int n, bool discard)
{
	uint8_t *disk = (uint8_t *)(uintptr_t)e->target.memory;
	uint64_t total = 0;

	for (int i = 0; i < n; i++)
		total += ranges[i].length;
	if (total > AT_ONCE)
		return false;
	for (int i = 0; i < n; i++) {
		uint8_t *from = disk + ranges[i].offset;
		if (discard || ranges[i].unmap)
			deallocate(from, from + ranges[i].length);
		else
			memset(from, 0, ranges[i].length);
	}
	return true;
}
