/*
 * Guest memory: the map from guest addresses (IOVA) to the core's own mappings, and the SIGBUS handler.
 *
 * The core never touches the transport's mapping of a region: the transport unmaps that when it likes.  It makes a
 * second one, an alias, which stays until nobody can hold a view of it any more.  When the region goes away the alias
 * is retired: anonymous memory takes its place, so that a late or stray access is harmless.
 */
#include "core.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

/*
 * A client can truncate the file behind a mapped region; touching it then raises SIGBUS.  The handler finds the range
 * in this table, the one global of the core, and puts anonymous memory over the hole.  Entries are claimed by base and
 * published by len, so the handler reads them without a lock.
 */
#define GUARDS 4096

static struct {
	_Atomic(uintptr_t) base;
	atomic_size_t len;
	atomic_size_t page_size;
	atomic_bool hole;
} guards[GUARDS];
static atomic_uint holes;
static struct sigaction previous_sigbus;
static pthread_once_t sigbus_once = PTHREAD_ONCE_INIT;

static bool fill_hole(uintptr_t fault, int code)
{
	for (int i = 0; i < GUARDS; i++) {
		uintptr_t base = atomic_load(&guards[i].base);
		size_t len = atomic_load(&guards[i].len), page = atomic_load(&guards[i].page_size);
		if (!len || fault < base || fault - base >= len)
			continue;
		/* an entry that is being given back or claimed anew is not the one that the fault is in */
		if (atomic_load(&guards[i].len) != len || atomic_load(&guards[i].base) != base)
			continue;
		/* the client has a say in the page size: count from the base, so as to stay within the mapping */
		uintptr_t from = fault - (fault - base) % page;
		size_t rest = base + len - from;
		/* past the end of a file everything above is a hole too; a poisoned page is only itself */
		size_t size = code == BUS_ADRERR || page > rest ? rest : page;
		if (mmap((void *)from, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
			return false;
		atomic_store(&guards[i].hole, true);
		atomic_fetch_add(&holes, 1);
		return true;
	}
	return false;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	(void)context;

	if (info->si_code > 0 && fill_hole((uintptr_t)info->si_addr, info->si_code)) {
		errno = saved;
		return;
	}
	/* not ours: the access is tried again under whoever had the signal before, such as Python's faulthandler */
	sigaction(number, &previous_sigbus, NULL);
	if (info->si_code <= 0)
		raise(number);
	errno = saved;
}

static void install(void)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };

	sigemptyset(&action.sa_mask);
	sigaction(SIGBUS, &action, &previous_sigbus);
}

void vmm_sigbus_install(void)
{
	pthread_once(&sigbus_once, install);
}

/* How many holes have been covered so far, in all. */
uint32_t vmm_sigbus_holes(void)
{
	return atomic_load(&holes);
}

/* Guard a mapping; the number of its entry, or -1. */
static int guard(uint8_t *base, size_t len, size_t page_size)
{
	for (int i = 0; i < GUARDS; i++) {
		uintptr_t free_entry = 0;
		if (!atomic_compare_exchange_strong(&guards[i].base, &free_entry, (uintptr_t)base))
			continue;
		atomic_store(&guards[i].page_size, page_size);
		atomic_store(&guards[i].hole, false);
		atomic_store(&guards[i].len, len);
		return i;
	}
	return -1;
}

static void forget_guard(uint8_t *base)
{
	for (int i = 0; i < GUARDS; i++) {
		if (atomic_load(&guards[i].base) == (uintptr_t)base) {
			atomic_store(&guards[i].len, 0);
			atomic_store(&guards[i].base, 0);
			return;
		}
	}
}

/* The region that holds iova, or NULL. */
struct vmm_region *vmm_region_find(struct vmm_memory *m, uint64_t iova)
{
	uint32_t low = 0, high = m->count;

	while (low < high) {
		uint32_t middle = (low + high) / 2;
		if (m->regions[middle].iova <= iova)
			low = middle + 1;
		else
			high = middle;
	}
	if (!low)
		return NULL;
	struct vmm_region *r = &m->regions[low - 1];
	return iova - r->iova < r->size ? r : NULL;
}

/* The host address of [iova, iova + len) if it lies in r, which holds iova or is NULL, and r allows prot; else NULL. */
uint8_t *vmm_region_reach(const struct vmm_region *r, uint64_t iova, uint64_t len, int prot)
{
	if (!r || !r->addr || (r->prot & (uint32_t)prot) != (uint32_t)prot)
		return NULL;
	uint64_t offset = iova - r->iova;
	return len <= r->size - offset ? r->addr + offset : NULL;
}

/* The same for the region that holds iova. */
uint8_t *vmm_translate(struct vmm_memory *m, uint64_t iova, uint64_t len, int prot)
{
	return vmm_region_reach(vmm_region_find(m, iova), iova, len, prot);
}

/* Whether anonymous memory had to stand in for some of what the guest and we share. */
bool vmm_memory_holed(const struct vmm_memory *m)
{
	for (uint32_t i = 0; i < m->count; i++)
		if (m->regions[i].addr && atomic_load(&guards[m->regions[i].guard].hole))
			return true;
	return false;
}

static uint8_t *make_alias(void *source, size_t len, size_t page_size, int *entry)
{
	/* an old length of 0 makes a second mapping of the same shared pages and leaves the first alone */
	uint8_t *base = mremap(source, 0, len, MREMAP_MAYMOVE);

	if (base == MAP_FAILED)
		return NULL;
	madvise(base, len, MADV_DONTDUMP);
	*entry = guard(base, len, page_size);
	if (*entry < 0) {
		munmap(base, len);
		errno = ENOSPC;
		return NULL;
	}
	return base;
}

static void describe(const struct vmm_region *r, uint32_t old, struct vmm_alias *out)
{
	*out = (struct vmm_alias){
		.id = r->alias, .old = old, .prot = r->prot, .iova = r->iova, .size = r->size,
		.addr = (uintptr_t)r->addr, .map_base = (uintptr_t)r->map_base, .map_len = r->map_len,
	};
}

/*
 * vaddr is where the transport mapped the region, in its mapping [map_base, map_base + map_len); 0 for memory that
 * came without a file descriptor.  Every number may be a hostile client's.
 */
int vmm_memory_map(struct vmm_memory *m, uint64_t iova, uint64_t size, uint64_t vaddr, uint64_t map_base,
		   uint64_t map_len, uint64_t page_size, uint32_t prot, struct vmm_alias *out)
{
	struct vmm_region r = { .iova = iova, .size = size, .prot = prot, .page_size = page_size };
	uint32_t at = 0;

	if (!size || iova + size - 1 < iova)
		return -EINVAL;
	while (at < m->count && m->regions[at].iova < iova)
		at++;
	if (at && iova - m->regions[at - 1].iova < m->regions[at - 1].size)
		return -EEXIST;
	if (at < m->count && m->regions[at].iova - iova < size)
		return -EEXIST;
	if (m->count == VMM_MAX_REGIONS)
		return -ENOSPC;
	if (vaddr) {
		if (vaddr < map_base || vaddr - map_base > map_len || map_len - (vaddr - map_base) < size)
			return -EINVAL;
		if (!page_size || page_size & (page_size - 1))
			return -EINVAL;
		r.source = (void *)(uintptr_t)map_base;
		r.map_base = make_alias(r.source, map_len, page_size, &r.guard);
		if (!r.map_base)
			return -errno;
		r.map_len = map_len;
		r.addr = r.map_base + (vaddr - map_base);
	}
	r.alias = ++m->next_alias;
	memmove(&m->regions[at + 1], &m->regions[at], (m->count - at) * sizeof(r));
	m->regions[at] = r;
	m->count++;
	m->generation++;
	describe(&r, 0, out);
	return 0;
}

static void retire(struct vmm_region *r)
{
	/* should this fail the guest's pages stay reachable for a stray view; the mapping goes with the last view */
	(void)!mmap(r->map_base, r->map_len, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

/* Forget a region and retire its alias, whose id is told (0 if it had none); vmm_alias_release() frees it later. */
int vmm_memory_unmap(struct vmm_memory *m, uint64_t iova, uint64_t size, uint32_t *alias)
{
	struct vmm_region *r = vmm_region_find(m, iova);

	if (!r || r->iova != iova || r->size != size)
		return -ENOENT;
	*alias = r->addr ? r->alias : 0;
	if (r->addr)
		retire(r);
	m->count--;
	memmove(r, r + 1, (size_t)(&m->regions[m->count] - r) * sizeof(*r));
	m->generation++;
	return 0;
}

/*
 * Take a region's alias away from whoever still uses it: stand_in, anonymous memory of the same length, takes its
 * place atomically, and the region gets a fresh alias.
 */
int vmm_alias_swap(struct vmm_memory *m, struct vmm_region *r, uint8_t *stand_in, struct vmm_alias *out)
{
	uint32_t old = r->alias;
	int entry;
	uint8_t *fresh = make_alias(r->source, r->map_len, r->page_size, &entry);

	if (!fresh)
		return -errno;
	if (mremap(stand_in, r->map_len, r->map_len, MREMAP_MAYMOVE | MREMAP_FIXED, r->map_base) == MAP_FAILED) {
		int error = errno;
		forget_guard(fresh);
		munmap(fresh, r->map_len);
		return -error;
	}
	r->addr = fresh + (r->addr - r->map_base);
	r->map_base = fresh;
	r->guard = entry;
	r->alias = ++m->next_alias;
	m->generation++;
	describe(r, old, out);
	return 0;
}

/* The last view of a retired alias is gone. */
void vmm_alias_release(uint64_t map_base, uint64_t map_len)
{
	uint8_t *base = (uint8_t *)(uintptr_t)map_base;

	forget_guard(base);
	munmap(base, map_len);
}
