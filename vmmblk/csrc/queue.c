/*
 * The device's side of a split virtqueue (VIRTIO 1.4, "Split Virtqueues").
 *
 * vmm_queue_pop() takes a batch of chains.  Of each it copies every descriptor once, checks the copy, and translates
 * what it names into segments.  How header, data and status are laid over descriptors is not assumed: the first 16
 * readable bytes are the header, the last writable byte is the status, what lies between is data.  A ring that breaks
 * a rule is -EPROTO from then on, never "end of chain".
 *
 * While a queue is being served the driver is told that doorbells are not needed.  When it runs dry they are armed
 * again, and the available index is looked at once more after a full fence: the driver stores its index and then looks
 * whether to kick, we store our wish and then look at its index; one of us sees the other.
 */
#include "core.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1

#define STATUS_IOERR 1
#define NO_SLOT UINT32_MAX
#define IDLE_SEGS 64		/* a free slot keeps at most so many segments allocated */

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

/* Where the walk over one chain stands. */
struct walk {
	struct vmm_queue *q;
	struct vmm_memory *m;
	struct slot *slot;
	struct vmm_chain *chain;
	uint64_t table;			/* IOVA of the descriptor table being followed */
	uint32_t entries;
	bool indirect;
	bool writable;			/* a device-writable element was seen */
	uint64_t held_iova, held_len;	/* the last writable element: its last byte may be the status */
};

/* ---- the three areas ------------------------------------------------------------------------------------------ */

static uint64_t avail_size(uint32_t n) { return 6 + 2ull * n; }
static uint64_t used_size(uint32_t n) { return 6 + 8ull * n; }

static bool aligned(const void *p, size_t to)
{
	return ((uintptr_t)p & (to - 1)) == 0;
}

static bool wraps(uint64_t iova, uint64_t len)
{
	return len && len - 1 > UINT64_MAX - iova;
}

static int check_area(struct vmm_queue *q, struct area *a, size_t align, int prot)
{
	struct vmm_memory *m = &q->device->memory;
	uint64_t at = a->iova, left = a->len;

	if (wraps(a->iova, a->len))
		return -EPROTO;
	a->host = vmm_translate(m, a->iova, a->len, prot);
	if (a->host)
		return aligned(a->host, align) ? 0 : -EPROTO;
	while (left) {		/* it may lie over several regions, or over a hole */
		struct vmm_region *r = vmm_region_find(m, at);
		if (!r)
			return -ENOENT;
		if (!r->addr)
			return -EFAULT;
		if ((r->prot & (uint32_t)prot) != (uint32_t)prot || !aligned(r->addr + (at - r->iova), align))
			return -EPROTO;
		uint64_t part = r->size - (at - r->iova);
		if (part >= left)
			return 0;
		if (part % align)	/* the boundary would cut through a field */
			return -EPROTO;
		at += part;
		left -= part;
	}
	return 0;
}

static int find_areas(struct vmm_queue *q)
{
	int error;

	if ((error = check_area(q, &q->desc, 16, PROT_READ)))
		return error;
	if ((error = check_area(q, &q->driver, 2, PROT_READ)))
		return error;
	if ((error = check_area(q, &q->used, 4, PROT_READ | PROT_WRITE)))
		return error;
	q->generation = q->device->memory.generation;
	return 0;
}

/*
 * Behind a hole in guest memory (see memory.c) is memory that nobody else sees, so neither rings nor data can be
 * trusted any more, until the driver has been told and the memory has been mapped anew.
 */
static bool memory_lost(struct vmm_queue *q)
{
	uint32_t holes = vmm_sigbus_holes();

	if (q->holes != holes) {
		q->holes = holes;
		q->lost = q->lost || vmm_memory_holed(&q->device->memory);
	}
	return q->lost;
}

/* The host address of len bytes at an offset in an area. */
static void *at(struct vmm_queue *q, const struct area *a, uint64_t offset, size_t len)
{
	if (a->host)
		return a->host + offset;
	return vmm_translate(&q->device->memory, a->iova + offset, len, PROT_READ);
}

static bool load16(struct vmm_queue *q, const struct area *a, uint64_t offset, uint16_t *value)
{
	_Atomic(uint16_t) *p = at(q, a, offset, 2);

	if (!p)
		return false;
	*value = le16toh(atomic_load_explicit(p, memory_order_acquire));
	return true;
}

static bool store16(struct vmm_queue *q, const struct area *a, uint64_t offset, uint16_t value)
{
	_Atomic(uint16_t) *p = at(q, a, offset, 2);

	if (!p)
		return false;
	atomic_store_explicit(p, htole16(value), memory_order_release);
	return true;
}

static bool store32(struct vmm_queue *q, const struct area *a, uint64_t offset, uint32_t value)
{
	_Atomic(uint32_t) *p = at(q, a, offset, 4);

	if (!p)
		return false;
	atomic_store_explicit(p, htole32(value), memory_order_relaxed);
	return true;
}

static bool load_avail_idx(struct vmm_queue *q, uint16_t *idx)
{
	return load16(q, &q->driver, 2, idx);
}

static bool store_used_flags(struct vmm_queue *q, uint16_t flags)
{
	q->kicks_off = flags & USED_F_NO_NOTIFY;
	return store16(q, &q->used, 0, flags);
}

/* ---- slots: what is known of a chain between pop and completion ------------------------------------------------- */

static bool make_slots(struct vmm_queue *q)
{
	q->slots = calloc(q->max_size, sizeof(*q->slots));
	if (!q->slots)
		return false;
	for (uint32_t i = 0; i < q->max_size; i++)
		q->slots[i].next_free = i + 1 < q->max_size ? i + 1 : NO_SLOT;
	q->free_slot = 0;
	return true;
}

static void free_slot(struct vmm_queue *q, struct slot *s)
{
	q->segs_in_flight -= s->nr_segs;
	s->nr_segs = 0;
	if (s->max_segs > IDLE_SEGS) {
		free(s->segs);
		s->segs = NULL;
		s->max_segs = 0;
	}
	s->state = SLOT_FREE;
	s->generation++;
	s->next_free = q->free_slot;
	q->free_slot = (uint32_t)(s - q->slots);
}

static uint32_t token_of(const struct vmm_queue *q, const struct slot *s)
{
	return (uint32_t)(s - q->slots) | (uint32_t)s->generation << 16;
}

static struct slot *slot_of(struct vmm_queue *q, uint32_t token)
{
	uint32_t index = token & 0xffff;

	if (!q->slots || index >= q->max_size)
		return NULL;
	struct slot *s = &q->slots[index];
	bool known = s->state == SLOT_IN_FLIGHT || s->state == SLOT_ORPHANED;
	return known && s->generation == token >> 16 ? s : NULL;
}

static bool grow_segs(struct slot *s, uint32_t limit)
{
	uint32_t want = s->max_segs ? s->max_segs * 2 : 8;

	if (s->nr_segs >= limit)
		return false;
	if (want > limit)
		want = limit;
	struct vmm_seg *segs = realloc(s->segs, want * sizeof(*segs));
	if (!segs)
		return false;
	s->segs = segs;
	s->max_segs = want;
	return true;
}

static uint32_t chain_limit(const struct vmm_queue *q)
{
	return q->config.size > VMM_CHAIN_MIN_LIMIT ? q->config.size : VMM_CHAIN_MIN_LIMIT;
}

/* ---- one chain -------------------------------------------------------------------------------------------------- */

static void unreachable(struct walk *w, const struct vmm_region *r)
{
	w->chain->flags |= VMM_CHAIN_UNREACHABLE;
	if (r && !r->addr)
		w->chain->flags |= VMM_CHAIN_NO_FD;
}

static bool add_piece(struct walk *w, const struct vmm_region *r, uint64_t offset, uint32_t len, bool joins)
{
	struct slot *s = w->slot;

	if (joins && s->nr_segs) {	/* neighbours in the same alias are one segment */
		struct vmm_seg *last = &s->segs[s->nr_segs - 1];
		if (last->alias == r->alias && last->offset + last->len == offset && last->len + (uint64_t)len <= UINT32_MAX) {
			last->len += len;
			return true;
		}
	}
	if (s->nr_segs == s->max_segs && !grow_segs(s, chain_limit(w->q) + VMM_SEGS_SLACK)) {
		unreachable(w, NULL);
		return false;
	}
	s->segs[s->nr_segs++] = (struct vmm_seg){ .alias = r->alias, .len = len, .offset = offset };
	return true;
}

/* Add [iova, iova + len) to the data, over however many regions it lies. */
static void add_data(struct walk *w, uint64_t iova, uint64_t len, bool write)
{
	uint32_t prot = write ? PROT_WRITE : PROT_READ;
	uint64_t *total = write ? &w->chain->writable : &w->chain->readable;
	bool joins = write ? w->chain->writable > 0 : w->chain->readable > 0;

	*total += len;
	if (w->chain->flags & VMM_CHAIN_UNREACHABLE)
		return;		/* nobody will look at the data, and a walk over many regions takes long */
	while (len) {
		struct vmm_region *r = vmm_region_find(w->m, iova);
		if (!r || !r->addr || (r->prot & prot) != prot) {
			unreachable(w, r);
			return;
		}
		uint64_t offset = iova - r->iova;
		uint64_t part = r->size - offset < len ? r->size - offset : len;
		if (!add_piece(w, r, offset, (uint32_t)part, joins))
			return;
		joins = true;
		iova += part;
		len -= part;
	}
}

static void copy_header(struct walk *w, uint64_t iova, uint64_t len)
{
	uint8_t *to = w->chain->header + w->chain->header_len;

	w->chain->header_len += (uint32_t)len;	/* what cannot be reached stays zero */
	while (len) {
		struct vmm_region *r = vmm_region_find(w->m, iova);
		if (!r || !r->addr || !(r->prot & PROT_READ)) {
			unreachable(w, r);
			return;
		}
		uint64_t left = r->size - (iova - r->iova);
		uint64_t part = left < len ? left : len;
		memcpy(to, r->addr + (iova - r->iova), part);
		to += part;
		iova += part;
		len -= part;
	}
}

static void add_readable(struct walk *w, uint64_t iova, uint32_t len)
{
	uint64_t head = VMM_HEADER_SIZE - w->chain->header_len;

	if (head > len)
		head = len;
	copy_header(w, iova, head);
	add_data(w, iova + head, len - head, false);
}

static void add_writable(struct walk *w, uint64_t iova, uint32_t len)
{
	if (!w->writable) {
		w->chain->readable_segs = w->slot->nr_segs;
		w->writable = true;
	}
	if (!len)
		return;
	add_data(w, w->held_iova, w->held_len, true);
	w->held_iova = iova;
	w->held_len = len;
}

/* The last writable byte is the status; what comes before it in its element is data. */
static void finish(struct walk *w)
{
	struct vmm_chain *c = w->chain;
	struct slot *s = w->slot;

	if (!w->writable)
		c->readable_segs = s->nr_segs;
	s->has_status = false;
	if (w->held_len) {
		s->status_iova = w->held_iova + w->held_len - 1;
		add_data(w, w->held_iova, w->held_len - 1, true);
		s->has_status = !wraps(w->held_iova, w->held_len) && vmm_translate(w->m, s->status_iova, 1, PROT_WRITE);
		if (!s->has_status)
			unreachable(w, vmm_region_find(w->m, s->status_iova));
	}
	if (!s->has_status)
		c->flags |= VMM_CHAIN_NO_STATUS;
	if (c->readable > UINT32_MAX || c->writable >= UINT32_MAX)
		unreachable(w, NULL);	/* more than a used length can tell */
	s->readable_segs = c->readable_segs;
	s->writable = c->writable;
	c->writable_segs = s->nr_segs - c->readable_segs;
	c->segs = s->segs;
}

static bool read_desc(struct walk *w, uint32_t index, struct desc *d)
{
	uint64_t offset = 16ull * index;
	struct desc raw;
	void *p;

	if (w->indirect)
		p = offset > UINT64_MAX - w->table ? NULL : vmm_translate(w->m, w->table + offset, 16, PROT_READ);
	else
		p = at(w->q, &w->q->desc, offset, 16);
	if (!p)
		return false;
	memcpy(&raw, p, sizeof(raw));
	/* the compiler must not go back to guest memory for a second look */
	atomic_signal_fence(memory_order_seq_cst);
	*d = (struct desc){ le64toh(raw.addr), le32toh(raw.len), le16toh(raw.flags), le16toh(raw.next) };
	return true;
}

static bool enter_indirect(struct walk *w, const struct desc *d)
{
	if (!w->q->config.indirect || w->indirect || d->flags & DESC_F_NEXT || !d->len || d->len % 16)
		return false;
	w->indirect = true;
	w->table = d->addr;
	w->entries = d->len / 16;
	return true;
}

static int walk_chain(struct walk *w, uint16_t head)
{
	uint32_t index = head, limit = chain_limit(w->q), direct = 0, seen = 0;
	struct desc d;

	do {
		/*
		 * A direct chain longer than the queue must loop, a table longer than it is read in bounds; what points
		 * at the table is no element, hence one more than the limit.
		 */
		if (index >= w->entries || seen++ > limit || (!w->indirect && direct++ >= w->q->config.size))
			return -EPROTO;
		if (!read_desc(w, index, &d))
			return -EPROTO;
		if (d.flags & DESC_F_INDIRECT) {
			if (!enter_indirect(w, &d))
				return -EPROTO;
			index = 0;
			d.flags = DESC_F_NEXT;
			continue;
		}
		if (wraps(d.addr, d.len))
			unreachable(w, NULL);
		if (d.flags & DESC_F_WRITE)
			add_writable(w, d.addr, d.len);
		else if (w->writable)
			return -EPROTO;
		else
			add_readable(w, d.addr, d.len);
		index = d.next;
	} while (d.flags & DESC_F_NEXT);
	finish(w);
	return 0;
}

static int take_chain(struct vmm_queue *q, struct vmm_chain *chain)
{
	struct slot *s = &q->slots[q->free_slot];
	struct walk w = { .q = q, .m = &q->device->memory, .slot = s, .chain = chain, .entries = q->config.size };
	uint16_t head;

	*chain = (struct vmm_chain){ .flags = 0 };
	if (!load16(q, &q->driver, 4 + 2ull * (q->next_avail % q->config.size), &head))
		return -EPROTO;
	int error = walk_chain(&w, head);
	if (error) {
		s->nr_segs = 0;
		return error;
	}
	q->free_slot = s->next_free;
	s->state = SLOT_IN_FLIGHT;
	s->head = head;
	s->epoch = q->epoch;
	chain->token = token_of(q, s);
	q->segs_in_flight += s->nr_segs;
	q->in_flight++;
	q->next_avail++;
	q->saw_chain = true;
	return 0;
}

/* ---- completing ------------------------------------------------------------------------------------------------- */

static bool put_used(struct vmm_queue *q, uint16_t head, uint32_t len)
{
	uint64_t offset = 4 + 8ull * (q->next_used % q->config.size);

	if (!store32(q, &q->used, offset, head) || !store32(q, &q->used, offset + 4, len))
		return false;
	q->next_used++;
	return true;
}

static uint32_t put_status(struct vmm_queue *q, const struct slot *s, uint32_t status, uint32_t written)
{
	uint8_t *p = s->has_status ? vmm_translate(&q->device->memory, s->status_iova, 1, PROT_WRITE) : NULL;

	if (!p)
		return 0;
	*p = (uint8_t)status;
	/* only what was written without a gap counts; the status comes last */
	return written < s->writable ? written : (uint32_t)s->writable + 1;
}

/* Does the driver wait for the chain still: its queue alive, and not reset since? */
static bool awaited(const struct vmm_queue *q, const struct slot *s)
{
	return q->started && !q->broken && s->epoch == q->epoch;
}

static bool areas_found(struct vmm_queue *q)
{
	return q->generation == q->device->memory.generation || !find_areas(q);
}

static bool complete_live(struct vmm_queue *q, struct slot *s, uint32_t status, uint32_t written)
{
	if (memory_lost(q)) {	/* maybe the data went into a hole */
		status = STATUS_IOERR;
		written = 0;
	}
	bool told = awaited(q, s) && areas_found(q) && put_used(q, s->head, put_status(q, s, status, written));

	q->in_flight--;
	free_slot(q, s);
	return told;
}

/*
 * An orphan's memory was taken back, so its data went nowhere and nobody can say what was done.  If its queue has not
 * been reset since, the driver still waits for it and is told so, now or, if the ring or the status byte is not mapped
 * at the moment, after a later map.  Nor is a paused queue's ring touched: the transport may have said that it is not.
 * False in those cases.
 */
static bool tell_orphan(struct vmm_queue *q, const struct slot *s, bool *told)
{
	if (!awaited(q, s))
		return true;
	if (q->pause & (VMM_PAUSE_QUIESCE | VMM_PAUSE_RESET | VMM_PAUSE_BUS_MASTER))
		return false;
	if (!areas_found(q) || (s->has_status && !vmm_translate(&q->device->memory, s->status_iova, 1, PROT_WRITE)))
		return false;
	*told |= put_used(q, s->head, put_status(q, s, STATUS_IOERR, 0));
	return true;
}

/* The last orphan lets the requests that wait go on. */
static bool complete_orphan(struct vmm_queue *q, struct slot *s)
{
	bool told = false;

	q->orphans--;
	atomic_fetch_sub(&q->device->orphans, 1);
	if (tell_orphan(q, s, &told)) {
		free_slot(q, s);
	} else {
		s->state = SLOT_UNTOLD;
		q->untold++;
	}
	return told;
}

static bool complete_one(struct vmm_queue *q, const struct vmm_completion *done)
{
	struct slot *s = slot_of(q, done->token);

	if (!s)
		return false;
	return s->state == SLOT_ORPHANED ? complete_orphan(q, s) : complete_live(q, s, done->status, done->written);
}

/* "Used Buffer Notification Suppression": is an interrupt due for moving the used index from old to where it is? */
static bool interrupt_due(struct vmm_queue *q, uint16_t old)
{
	uint16_t value;

	atomic_thread_fence(memory_order_seq_cst);
	if (q->config.event_idx) {
		if (!load16(q, &q->driver, 4 + 2ull * q->config.size, &value))
			return true;
		return (uint16_t)(q->next_used - value - 1) < (uint16_t)(q->next_used - old);
	}
	return !load16(q, &q->driver, 0, &value) || !(value & AVAIL_F_NO_INTERRUPT);
}

/* Show the driver the used elements since old.  True: send_interrupt() is due, with no lock held. */
static bool publish_used(struct vmm_queue *q, uint16_t old)
{
	bool interrupt = store16(q, &q->used, 2, q->next_used) && interrupt_due(q, old);

	q->notifying += interrupt;
	return interrupt;
}

static void tell_drained(struct vmm_queue *q)
{
	if (q->pause && !vmm_queue_busy_locked(q))
		eventfd_write(q->device->drained_fd, 1);
}

static void send_interrupt(struct vmm_queue *q)
{
	vmm_device_notify_queue(q->device, atomic_load(&q->vector));
	pthread_mutex_lock(&q->lock);
	q->notifying--;
	tell_drained(q);
	pthread_mutex_unlock(&q->lock);
}

static void free_untold(struct vmm_queue *q, struct slot *s)
{
	q->untold--;
	free_slot(q, s);
}

/* Memory has been mapped: tell the driver of orphans that have ended before. */
static bool tell_ended(struct vmm_queue *q)
{
	uint16_t old = q->next_used;
	bool told = false;

	for (uint32_t i = 0; q->untold && i < q->max_size; i++) {
		struct slot *s = &q->slots[i];
		if (s->state == SLOT_UNTOLD && tell_orphan(q, s, &told))
			free_untold(q, s);
	}
	return told && publish_used(q, old);
}

static void kick_all(struct vmm_device *d)
{
	for (uint32_t i = 0; i < d->nr_queues; i++)
		if (d->queues[i].kick_fd >= 0)
			eventfd_write(d->queues[i].kick_fd, 1);
}

/*
 * Complete chains: status bytes, used entries, then one used index for all, then an interrupt if the driver wants one.
 * Tokens that are not in flight are ignored.  Returns how many the driver was told of.
 */
int vmm_queue_complete(struct vmm_queue *q, const struct vmm_completion *done, int n)
{
	bool interrupt = false, orphans_ended, starved;
	int told = 0;

	pthread_mutex_lock(&q->lock);
	uint16_t old = q->next_used;
	uint32_t orphans = q->orphans;
	for (int i = 0; i < n; i++)
		told += complete_one(q, &done[i]);
	if (told)
		interrupt = publish_used(q, old);
	orphans_ended = orphans && !atomic_load(&q->device->orphans);
	starved = q->starved || (q->lost && !q->broken);
	q->starved = false;
	if (!interrupt)
		tell_drained(q);
	pthread_mutex_unlock(&q->lock);

	if (interrupt)
		send_interrupt(q);
	if (orphans_ended)
		kick_all(q->device);
	else if (starved)		/* the next pop goes on, or tells what is wrong */
		eventfd_write(q->kick_fd, 1);
	return told;
}

/* ---- popping ---------------------------------------------------------------------------------------------------- */

/* How many chains are available; -EPROTO when the index jumped further than the ring is long. */
static int available(struct vmm_queue *q)
{
	uint16_t idx;

	if (!load_avail_idx(q, &idx))
		return -EPROTO;
	uint16_t n = (uint16_t)(idx - q->next_avail);
	return n > q->config.size ? -EPROTO : n;
}

static bool quiet_kicks(struct vmm_queue *q)
{
	if (q->config.event_idx || q->kicks_off)
		return true;	/* an avail event in the past is quiet by itself */
	return store_used_flags(q, USED_F_NO_NOTIFY);
}

/* Ask for a doorbell at the next chain, then look once more: -1 error, 0 nothing, 1 something came meanwhile. */
static int arm_kicks(struct vmm_queue *q)
{
	bool stored = q->config.event_idx
		? store16(q, &q->used, 4 + 8ull * q->config.size, q->next_avail)
		: store_used_flags(q, 0);

	atomic_thread_fence(memory_order_seq_cst);
	int n = stored ? available(q) : -EPROTO;
	return n < 0 ? -1 : n > 0;
}

static bool may_take(const struct vmm_queue *q)
{
	return !q->in_flight || q->segs_in_flight < VMM_SEGS_BUDGET;
}

static int pop_available(struct vmm_queue *q, struct vmm_chain *out, int max)
{
	int n = 0;

	for (;;) {
		int waiting = available(q);
		if (waiting < 0 || !quiet_kicks(q))
			goto corrupt;
		for (; waiting && n < max && may_take(q); waiting--, n++) {
			if (q->in_flight + q->untold >= q->config.size || take_chain(q, &out[n]))
				goto corrupt;
		}
		if (waiting) {
			q->starved = !may_take(q);
			return n;
		}
		int more = arm_kicks(q);
		if (more < 0)
			goto corrupt;
		if (!more)
			return n;
	}
corrupt:
	q->broken = -EPROTO;
	if (!n)
		return -EPROTO;
	/* the chains before the fault are whole: they are served, and the next pop tells, without the driver's help */
	eventfd_write(q->kick_fd, 1);
	return n;
}

/*
 * Pop up to max chains.  0: none, and a doorbell will come; max: there may be more.  -EPROTO: the ring is corrupt,
 * -EFAULT: it lies in memory without a file descriptor, -EIO: guest memory is gone; they stay until the queue is
 * stopped.  A queue whose areas are not mapped at the moment is parked: 0, and it is looked at again after the next map.
 */
int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *out, int max)
{
	bool interrupt = false;
	int n = 0;

	pthread_mutex_lock(&q->lock);
	if (!q->started || q->pause || atomic_load(&q->device->orphans))
		goto out;
	if (!q->broken && memory_lost(q))
		q->broken = -EIO;
	if (!q->broken && q->generation != q->device->memory.generation) {
		int error = find_areas(q);
		q->parked = error == -ENOENT;
		if (q->parked)
			goto out;
		q->broken = error;
	}
	if (q->untold && !q->broken)
		interrupt = tell_ended(q);
	n = q->broken ? q->broken : pop_available(q, out, max);
	if (n <= 0 && memory_lost(q))
		n = q->broken = -EIO;
out:
	pthread_mutex_unlock(&q->lock);
	if (interrupt)
		send_interrupt(q);
	return n;
}

/*
 * A doorbell came, but the ring reads as if it had never been touched: memory whose file descriptor we were given but
 * whose contents the guest does not share (share=off) looks like this.
 */
bool vmm_queue_looks_unshared(struct vmm_queue *q)
{
	static const struct desc zero;
	bool suspicious = false;
	uint16_t idx;

	pthread_mutex_lock(&q->lock);
	if (q->started && !q->broken && !q->saw_chain && !q->parked &&
	    q->generation == q->device->memory.generation && load_avail_idx(q, &idx)) {
		const void *first = at(q, &q->desc, 0, sizeof(zero));
		suspicious = idx == 0 && first && !memcmp(first, &zero, sizeof(zero));
	}
	pthread_mutex_unlock(&q->lock);
	return suspicious;
}

/* ---- life ------------------------------------------------------------------------------------------------------- */

/*
 * Start a stopped queue from position 0.  -EINVAL: impossible size or already started; -EPROTO: misaligned areas;
 * -ENOENT: an area outside guest memory; -EFAULT: in memory without a file descriptor; -EIO: guest memory is gone;
 * -ENOMEM.
 */
int vmm_queue_start(struct vmm_queue *q, const struct vmm_queue_config *config)
{
	uint32_t n = config->size;
	int error = -EINVAL;

	pthread_mutex_lock(&q->lock);
	if (q->started || !n || n > q->max_size || n & (n - 1))
		goto out;
	error = -ENOMEM;
	if (!q->slots && !make_slots(q))
		goto out;
	error = -EPROTO;
	if (config->desc % 16 || config->driver % 2 || config->device % 4)
		goto out;
	q->config = *config;
	q->holes = vmm_sigbus_holes();
	q->lost = false;
	error = -EIO;
	if (vmm_memory_holed(&q->device->memory))
		goto out;
	q->desc = (struct area){ .iova = config->desc, .len = 16ull * n };
	q->driver = (struct area){ .iova = config->driver, .len = avail_size(n) };
	q->used = (struct area){ .iova = config->device, .len = used_size(n) };
	error = find_areas(q);
	if (error)
		goto out;
	q->next_avail = q->next_used = 0;
	q->parked = q->starved = q->saw_chain = false;
	q->broken = 0;
	q->epoch++;
	atomic_store(&q->vector, config->vector);
	if (!store_used_flags(q, 0)) {
		error = -EPROTO;
		goto out;
	}
	q->started = true;
out:
	pthread_mutex_unlock(&q->lock);
	return error;
}

/* Stop: from now on no ring is touched.  What is in flight must have been drained or orphaned before. */
void vmm_queue_stop(struct vmm_queue *q)
{
	pthread_mutex_lock(&q->lock);
	q->started = false;
	q->parked = false;
	q->broken = 0;
	for (uint32_t i = 0; q->untold && i < q->max_size; i++)
		if (q->slots[i].state == SLOT_UNTOLD)
			free_untold(q, &q->slots[i]);
	pthread_mutex_unlock(&q->lock);
}

void vmm_queue_set_vector(struct vmm_queue *q, uint32_t vector)
{
	atomic_store(&q->vector, vector);
}

uint32_t vmm_queue_busy_locked(const struct vmm_queue *q)
{
	return q->in_flight + q->notifying;
}

/* What is in flight and not orphaned, counting interrupts on their way. */
uint32_t vmm_queue_busy(struct vmm_queue *q)
{
	pthread_mutex_lock(&q->lock);
	uint32_t busy = vmm_queue_busy_locked(q);
	pthread_mutex_unlock(&q->lock);
	return busy;
}

/* Stop popping for a reason; returns what is still in flight.  drained_fd is written when that reaches 0. */
uint32_t vmm_queue_pause(struct vmm_queue *q, uint32_t reason)
{
	pthread_mutex_lock(&q->lock);
	q->pause |= reason;
	uint32_t busy = vmm_queue_busy_locked(q);
	pthread_mutex_unlock(&q->lock);
	return busy;
}

/* Take a reason back; when none is left the queue is kicked, since doorbells were not answered meanwhile. */
void vmm_queue_resume(struct vmm_queue *q, uint32_t reason)
{
	pthread_mutex_lock(&q->lock);
	bool resumed = q->pause & reason && !(q->pause & ~reason) && q->started;
	q->pause &= ~reason;
	pthread_mutex_unlock(&q->lock);
	if (resumed && q->kick_fd >= 0)
		eventfd_write(q->kick_fd, 1);
}

void vmm_queue_orphan_locked(struct vmm_queue *q)
{
	for (uint32_t i = 0; q->slots && i < q->max_size; i++) {
		if (q->slots[i].state != SLOT_IN_FLIGHT)
			continue;
		q->slots[i].state = SLOT_ORPHANED;
		q->orphans++;
		q->in_flight--;
		atomic_fetch_add(&q->device->orphans, 1);
	}
}
