/*
 * What the queues of one device share: the memory map, interrupts, pausing, and taking memory back from I/O that
 * does not end (orphaning).
 */
#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define ISR_QUEUE 1u
#define ISR_CONFIG 2u
#define INTX_VECTOR 0

struct vmm_device *vmm_device_new(uint32_t nr_queues, uint32_t queue_size_max, int drained_fd)
{
	struct vmm_device *d = calloc(1, sizeof(*d) + nr_queues * sizeof(d->queues[0]));

	if (!d)
		return NULL;
	vmm_sigbus_install();
	d->nr_queues = nr_queues;
	d->drained_fd = drained_fd;
	atomic_store(&d->config_vector, VMM_NO_VECTOR);
	for (uint32_t i = 0; i < nr_queues; i++) {
		struct vmm_queue *q = &d->queues[i];
		pthread_mutex_init(&q->lock, NULL);
		q->device = d;
		q->max_size = queue_size_max;
		q->kick_fd = q->timer_fd = -1;
		atomic_store(&q->vector, VMM_NO_VECTOR);
	}
	return d;
}

/* No thread may be in the core any more, and every region must have been unmapped. */
void vmm_device_free(struct vmm_device *d)
{
	for (uint32_t i = 0; i < d->nr_queues; i++) {
		struct vmm_queue *q = &d->queues[i];
		for (uint32_t s = 0; q->slots && s < q->max_size; s++)
			free(q->slots[s].segs);
		free(q->slots);
		if (q->timer_fd >= 0)
			close(q->timer_fd);
		pthread_mutex_destroy(&q->lock);
	}
	free(d);
}

/* The queue of that index, whose doorbells come over kick_fd (an eventfd, not owned). */
struct vmm_queue *vmm_device_queue(struct vmm_device *d, uint32_t index, int kick_fd)
{
	if (index >= d->nr_queues)
		return NULL;
	d->queues[index].kick_fd = kick_fd;
	return &d->queues[index];
}

/* ---- interrupts ("PCI-specific Initialization And Device Operation") --------------------------------------------- */

void vmm_device_irq_sink(struct vmm_device *d, uint64_t function, uint64_t arg)
{
	d->sink_arg = (void *)(uintptr_t)arg;
	d->sink = (vmm_irq_sink)(uintptr_t)function;
}

/*
 * From now on up to count completions share an interrupt, which is held back for at most so long.  Once, before any
 * queue is started: 0 or -errno.
 */
int vmm_device_coalesce(struct vmm_device *d, uint32_t count, uint64_t ns)
{
	for (uint32_t i = 0; i < d->nr_queues; i++) {
		d->queues[i].timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
		if (d->queues[i].timer_fd < 0)
			return -errno;
	}
	d->coalesce_count = count;
	d->coalesce_ns = ns;
	return 0;
}

void vmm_device_set_msix(struct vmm_device *d, bool on)
{
	atomic_store(&d->msix, on);
}

static void trigger(struct vmm_device *d, uint32_t vector)
{
	if (d->sink)
		d->sink(d->sink_arg, vector);
}

static void raise_intx(struct vmm_device *d)
{
	if (!atomic_load(&d->intx_disabled))
		trigger(d, INTX_VECTOR);
}

/* INTx is a level: whoever unmasks or enables it gets it again while a bit is set. */
void vmm_device_intx_again(struct vmm_device *d)
{
	if (!atomic_load(&d->msix) && atomic_load(&d->isr))
		raise_intx(d);
}

void vmm_device_set_intx_disabled(struct vmm_device *d, bool disabled)
{
	atomic_store(&d->intx_disabled, disabled);
	if (!disabled)
		vmm_device_intx_again(d);
}

void vmm_device_set_config_vector(struct vmm_device *d, uint32_t vector)
{
	atomic_store(&d->config_vector, vector);
}

/* A used buffer notification. */
void vmm_device_notify_queue(struct vmm_device *d, uint32_t vector)
{
	if (!atomic_load(&d->msix)) {
		atomic_fetch_or(&d->isr, ISR_QUEUE);
		raise_intx(d);
	} else if (vector != VMM_NO_VECTOR) {
		trigger(d, vector);
	}
}

/* A configuration change notification: its ISR bit is set whether or not MSI-X is enabled. */
void vmm_device_config_interrupt(struct vmm_device *d)
{
	uint32_t vector = atomic_load(&d->config_vector);

	atomic_fetch_or(&d->isr, ISR_CONFIG);
	if (!atomic_load(&d->msix))
		raise_intx(d);
	else if (vector != VMM_NO_VECTOR)
		trigger(d, vector);
}

uint32_t vmm_device_isr_take(struct vmm_device *d)
{
	return atomic_exchange(&d->isr, 0);
}

uint32_t vmm_device_isr_peek(struct vmm_device *d)
{
	return atomic_load(&d->isr);
}

/* ---- all queues at once ------------------------------------------------------------------------------------------ */

static void lock_all(struct vmm_device *d)
{
	for (uint32_t i = 0; i < d->nr_queues; i++)
		pthread_mutex_lock(&d->queues[i].lock);
}

static void unlock_all(struct vmm_device *d)
{
	for (uint32_t i = d->nr_queues; i--;)
		pthread_mutex_unlock(&d->queues[i].lock);
}

uint32_t vmm_device_pause(struct vmm_device *d, uint32_t reason)
{
	uint32_t busy = 0;

	for (uint32_t i = 0; i < d->nr_queues; i++)
		busy += vmm_queue_pause(&d->queues[i], reason);
	return busy;
}

void vmm_device_resume(struct vmm_device *d, uint32_t reason)
{
	for (uint32_t i = 0; i < d->nr_queues; i++)
		vmm_queue_resume(&d->queues[i], reason);
}

uint32_t vmm_device_busy(struct vmm_device *d)
{
	uint32_t busy = 0;

	for (uint32_t i = 0; i < d->nr_queues; i++)
		busy += vmm_queue_busy(&d->queues[i]);
	return busy;
}

uint32_t vmm_device_orphans(struct vmm_device *d)
{
	return atomic_load(&d->orphans);
}

/* Add a region; its alias is described in out.  -EINVAL, -EEXIST (overlap), -ENOSPC, or what mremap said. */
int vmm_device_map(struct vmm_device *d, uint64_t iova, uint64_t size, uint64_t vaddr, uint64_t map_base,
		   uint64_t map_len, uint64_t page_size, uint32_t prot, struct vmm_alias *out)
{
	lock_all(d);
	int error = vmm_memory_map(&d->memory, iova, size, vaddr, map_base, map_len, page_size, prot, out);
	unlock_all(d);
	return error;
}

/* Remove a region; *alias is the alias it had, now retired, or 0.  -ENOENT. */
int vmm_device_unmap(struct vmm_device *d, uint64_t iova, uint64_t size, uint32_t *alias)
{
	lock_all(d);
	int error = vmm_memory_unmap(&d->memory, iova, size, alias);
	unlock_all(d);
	return error;
}

/* ---- orphaning --------------------------------------------------------------------------------------------------- */

struct span {
	uint64_t from, to;
};

struct spans {
	struct span *list;
	size_t count, max;
};

static int by_start(const void *a, const void *b)
{
	const struct span *x = a, *y = b;

	return x->from < y->from ? -1 : x->from > y->from;
}

static bool add_span(struct spans *spans, const struct vmm_seg *seg)
{
	if (spans->count == spans->max) {
		size_t max = spans->max ? 2 * spans->max : 64;
		struct span *list = realloc(spans->list, max * sizeof(*list));
		if (!list)
			return false;
		spans->list = list;
		spans->max = max;
	}
	spans->list[spans->count++] = (struct span){ seg->offset, seg->offset + seg->len };
	return true;
}

static bool add_queue_spans(struct spans *spans, const struct vmm_queue *q, uint32_t alias, bool *used)
{
	for (uint32_t i = 0; q->slots && i < q->max_size; i++) {
		const struct slot *s = &q->slots[i];
		if (s->state != SLOT_IN_FLIGHT)
			continue;
		for (uint32_t k = 0; k < s->nr_segs; k++) {
			if (s->segs[k].alias != alias)
				continue;
			*used = true;
			if (k < s->readable_segs && !add_span(spans, &s->segs[k]))
				return false;
		}
	}
	return true;
}

/* Copy what in-flight writes are still to send, each byte once however often the guest named it. */
static void copy_spans(struct spans *spans, uint8_t *to, const uint8_t *from)
{
	uint64_t done = 0;

	if (spans->count)
		qsort(spans->list, spans->count, sizeof(*spans->list), by_start);
	for (size_t i = 0; i < spans->count; i++) {
		struct span s = spans->list[i];
		if (s.from < done)
			s.from = done;
		if (s.from >= s.to)
			continue;
		memcpy(to + s.from, from + s.from, s.to - s.from);
		done = s.to;
	}
}

/* Replace one region's alias if something in flight uses it: 1 replaced, 0 unused, or -errno. */
static int take_back(struct vmm_device *d, struct vmm_region *r, struct vmm_alias *fresh)
{
	struct spans spans = { 0 };
	bool used = false;
	int result = -ENOMEM;

	for (uint32_t i = 0; i < d->nr_queues; i++)
		if (!add_queue_spans(&spans, &d->queues[i], r->alias, &used))
			goto out;
	result = 0;
	if (!used)
		goto out;
	uint8_t *stand_in = mmap(NULL, r->map_len, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (stand_in == MAP_FAILED) {
		result = -errno;
		goto out;
	}
	copy_spans(&spans, stand_in + (r->addr - r->map_base), r->addr);
	result = vmm_alias_swap(&d->memory, r, stand_in, fresh);
	if (result)
		munmap(stand_in, r->map_len);
	else
		result = 1;
out:
	free(spans.list);
	return result;
}

/*
 * Take guest memory back from everything in flight.  The queues are paused until the caller knows the fresh aliases,
 * for what is popped next names them.  The blocks go on, but in memory of their own: reads land nowhere, writes send
 * what they were given.  Describes the *n fresh aliases in fresh, which holds VMM_MAX_REGIONS.  Everything in flight is
 * an orphan afterwards; -errno if some memory could not be taken back.
 */
int vmm_device_orphan(struct vmm_device *d, struct vmm_alias *fresh, int *n)
{
	int error = 0;

	*n = 0;
	lock_all(d);
	for (uint32_t i = 0; i < d->memory.count; i++) {
		struct vmm_region *r = &d->memory.regions[i];
		int taken = r->addr ? take_back(d, r, &fresh[*n]) : 0;
		if (taken > 0)
			++*n;
		else if (taken < 0)
			error = taken;
	}
	for (uint32_t i = 0; i < d->nr_queues; i++)
		vmm_queue_orphan_locked(&d->queues[i]);
	unlock_all(d);
	return error;
}
