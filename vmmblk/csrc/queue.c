/*
 * The device's side of a virtqueue: its life, popping, completing.  What differs between the formats is in split.c and
 * packed.c.
 *
 * vmm_queue_pop() takes a batch of chains.  Of each it copies every descriptor once, checks the copy, and translates
 * what it names into segments.  A ring that breaks a rule is -EPROTO from then on, never "end of chain".
 *
 * While a queue is being served the driver is told that doorbells are not needed.  When it runs dry they are armed
 * again, and the ring is looked at once more after a full fence: the driver makes a chain available and then looks
 * whether to kick, we store our wish and then look for chains; one of us sees the other.
 */
#include "ring.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#define STATUS_IOERR 1
#define NO_SLOT UINT32_MAX
#define IDLE_SEGS 64		/* a free slot keeps at most so many segments allocated */

/* ---- the three areas ------------------------------------------------------------------------------------------ */

static bool aligned(const void *p, size_t to)
{
	return ((uintptr_t)p & (to - 1)) == 0;
}

static int find_area(struct vmm_queue *q, struct area *a)
{
	struct vmm_memory *m = &q->device->memory;
	uint64_t at = a->iova, left = a->len;

	if (a->iova % a->align || vmm_wraps(a->iova, a->len))
		return -EPROTO;
	a->host = vmm_translate(m, a->iova, a->len, a->prot);
	if (a->host)
		return aligned(a->host, a->align) ? 0 : -EPROTO;
	while (left) {		/* it may lie over several regions, or over a hole */
		struct vmm_region *r = vmm_region_find(m, at);
		if (!r)
			return -ENOENT;
		if (!r->addr)
			return -EFAULT;
		if ((r->prot & (uint32_t)a->prot) != (uint32_t)a->prot || !aligned(r->addr + (at - r->iova), a->align))
			return -EPROTO;
		uint64_t part = r->size - (at - r->iova);
		if (part >= left)
			return 0;
		if (part % a->align)	/* the boundary would cut through a field */
			return -EPROTO;
		at += part;
		left -= part;
	}
	return 0;
}

static int find_areas(struct vmm_queue *q)
{
	struct area *areas[] = { &q->desc, &q->driver, &q->used };

	for (int i = 0; i < 3; i++) {
		int error = find_area(q, areas[i]);
		if (error)
			return error;
	}
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

/* ---- slots: what is known of a chain between pop and completion ------------------------------------------------- */

static bool make_slots(struct vmm_queue *q)
{
	q->slots = calloc(q->max_size, sizeof(*q->slots));
	if (!q->slots)
		return false;
	for (uint32_t i = 0; i < q->max_size; i++)
		q->slots[i].next = i + 1 < q->max_size ? i + 1 : NO_SLOT;
	q->free_slot = 0;
	q->first_untold = NO_SLOT;
	q->untold_end = &q->first_untold;
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
	s->next = q->free_slot;
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

/* ---- popping one chain ---------------------------------------------------------------------------------------------- */

static int take_chain(struct vmm_queue *q, struct vmm_chain *chain)
{
	struct slot *s = &q->slots[q->free_slot];
	struct walk w = { .q = q, .slot = s, .chain = chain };

	vmm_chain_begin(chain);
	int error = q->format->take(&w);
	if (error) {
		s->nr_segs = 0;
		return error;
	}
	vmm_chain_finish(&w);
	q->free_slot = s->next;
	s->state = SLOT_IN_FLIGHT;
	s->epoch = q->epoch;
	chain->token = token_of(q, s);
	q->segs_in_flight += s->nr_segs;
	q->in_flight++;
	q->saw_chain = true;
	return 0;
}

/* ---- completing ------------------------------------------------------------------------------------------------- */

static uint8_t *status_of(struct vmm_queue *q, const struct slot *s)
{
	return vmm_region_reach(vmm_region_near(q, s->status_iova), s->status_iova, 1, PROT_WRITE);
}

static uint32_t put_status(struct vmm_queue *q, const struct slot *s, uint32_t status, uint32_t written)
{
	uint8_t *p = s->has_status ? status_of(q, s) : NULL;

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
	bool told = awaited(q, s) && areas_found(q) && q->format->put_used(q, s, put_status(q, s, status, written));

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
	if (!areas_found(q) || (s->has_status && !status_of(q, s)))
		return false;
	*told |= q->format->put_used(q, s, put_status(q, s, STATUS_IOERR, 0));
	return true;
}

static void keep_untold(struct vmm_queue *q, struct slot *s)
{
	s->state = SLOT_UNTOLD;
	s->next = NO_SLOT;
	*q->untold_end = (uint32_t)(s - q->slots);
	q->untold_end = &s->next;
	q->untold++;
}

/* With IN_ORDER, what ended first and has not been told holds back whatever comes after it. */
static bool held_back(const struct vmm_queue *q)
{
	return q->config.in_order && q->untold;
}

/* The last orphan lets the requests that wait go on. */
static bool complete_orphan(struct vmm_queue *q, struct slot *s)
{
	bool told = false;

	q->orphans--;
	atomic_fetch_sub(&q->device->orphans, 1);
	if (!held_back(q) && tell_orphan(q, s, &told))
		free_slot(q, s);
	else
		keep_untold(q, s);
	return told;
}

static bool complete_one(struct vmm_queue *q, const struct vmm_completion *done)
{
	struct slot *s = slot_of(q, done->token);

	if (!s)
		return false;
	return s->state == SLOT_ORPHANED ? complete_orphan(q, s) : complete_live(q, s, done->status, done->written);
}

/* Does the driver want to be told of what it was shown since position old?  True: send_interrupt(), with no lock held. */
static bool tell_since(struct vmm_queue *q, uint16_t old)
{
	atomic_thread_fence(memory_order_seq_cst);	/* between what we gave back and the driver's wish */
	bool interrupt = q->format->interrupt_due(q, old);
	q->notifying += interrupt;
	return interrupt;
}

/* Show the driver what was given back since position old.  True as above. */
static bool publish_used(struct vmm_queue *q, uint16_t old)
{
	return q->format->publish(q) && tell_since(q, old);
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

/* ---- interrupts that are held back ------------------------------------------------------------------------------ */

/*
 * Only the interrupt is held back, what is used is shown at once; and the driver's wish is asked for when it is raised.
 * Whoever serves the queue raises it: with the completion that makes enough of them or leaves nothing in flight, when he
 * pops, and with vmm_queue_tell() before he sleeps.  A queue that is paused holds nothing back, so nobody who drains it
 * waits for that.
 */

static void forget_held(struct vmm_queue *q)
{
	q->held = 0;
	atomic_store(&q->held_until, 0);
}

/* Raise it.  True as for publish_used(). */
static bool tell_held(struct vmm_queue *q)
{
	if (!q->held)
		return false;
	forget_held(q);
	if (areas_found(q))
		return tell_since(q, q->held_from);
	q->notifying++;		/* the driver's wish cannot be read: one too many, never one too few */
	return true;
}

/* Nothing is in flight, nor will be without a doorbell: the driver waits for this interrupt alone. */
static bool awaited_alone(struct vmm_queue *q)
{
	return !q->in_flight && q->format->available(q) <= 0;
}

static bool held_long(const struct vmm_queue *q)
{
	return q->held && now_ns() >= atomic_load(&q->held_until);
}

/* As publish_used(), for so many chains, whose interrupt may be held back. */
static bool publish_coalesced(struct vmm_queue *q, uint16_t old, uint32_t chains)
{
	if (!q->format->publish(q))
		return false;
	bool late = held_long(q);
	if (!q->held) {
		q->held_from = old;
		atomic_store(&q->held_until, now_ns() + q->device->coalesce_ns);
	}
	q->held += chains;
	/* after a ring's length positions would be mistaken for others */
	bool due = late || q->held >= q->device->coalesce_count || q->pause || awaited_alone(q) ||
		   q->format->given_back(q, q->held_from) >= q->config.size;
	return due && tell_held(q);
}

static void set_timer(struct vmm_queue *q)
{
	uint64_t until = atomic_load(&q->held_until);
	struct itimerspec at = { .it_value = { (time_t)(until / 1000000000), (long)(until % 1000000000) } };

	if (until != q->timer_until && !timerfd_settime(q->timer_fd, TFD_TIMER_ABSTIME, &at, NULL))
		q->timer_until = until;
}

/*
 * Raise the interrupt that has been held back for long enough.  Whoever is about to sleep, or to let the queue alone for
 * an unknown time, says so, and is woken by the timer for the rest: then he asks again.
 */
void vmm_queue_tell(struct vmm_queue *q, bool sleep)
{
	if (q->timer_fd < 0)
		return;
	pthread_mutex_lock(&q->lock);
	bool interrupt = held_long(q) && tell_held(q);
	if (sleep)
		set_timer(q);
	pthread_mutex_unlock(&q->lock);
	if (interrupt)
		send_interrupt(q);
}

/* The descriptor that is readable when vmm_queue_tell() is due, for whoever said that he sleeps; -1: none ever is. */
int vmm_queue_timer(const struct vmm_queue *q)
{
	return q->timer_fd;
}

/* ---- completing, the rest --------------------------------------------------------------------------------------- */

/* Go past the slot that *link leads to, or free it. */
static uint32_t *past_untold(struct vmm_queue *q, uint32_t *link, bool done)
{
	struct slot *s = &q->slots[*link];

	if (!done)
		return &s->next;
	*link = s->next;
	q->untold--;
	free_slot(q, s);
	return link;
}

/* Memory has been mapped: tell the driver of orphans that have ended before, in that order. */
static bool tell_ended(struct vmm_queue *q)
{
	uint16_t old = q->next_used;
	uint32_t *link = &q->first_untold;
	bool told = false, done = true;

	while (*link != NO_SLOT && (done || !q->config.in_order)) {
		done = tell_orphan(q, &q->slots[*link], &told);
		link = past_untold(q, link, done);
	}
	if (*link == NO_SLOT)
		q->untold_end = link;
	if (!told || !q->held)
		return told && publish_used(q, old);
	return q->format->publish(q) && tell_held(q);
}

static void forget_ended(struct vmm_queue *q)
{
	while (q->untold)
		past_untold(q, &q->first_untold, true);
	q->untold_end = &q->first_untold;
}

static void kick_all(struct vmm_device *d)
{
	for (uint32_t i = 0; i < d->nr_queues; i++)
		if (d->queues[i].kick_fd >= 0)
			eventfd_write(d->queues[i].kick_fd, 1);
}

/*
 * Complete chains: status bytes, used entries, then one used index for all, then an interrupt if the driver wants one
 * (and it is not held back).
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
		interrupt = q->timer_fd >= 0 ? publish_coalesced(q, old, (uint32_t)told) : publish_used(q, old);
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

/* Say that doorbells are not needed, unless that has been said. */
static bool quiet_kicks(struct vmm_queue *q)
{
	if (q->kicks_off)
		return true;
	q->kicks_off = true;
	return q->format->quiet(q);
}

/* Ask for a doorbell at the next chain, then look once more. */
static int arm_kicks(struct vmm_queue *q)
{
	q->kicks_off = false;
	if (!q->format->arm(q))
		return -EPROTO;
	atomic_thread_fence(memory_order_seq_cst);
	return q->format->available(q);
}

static bool may_take(const struct vmm_queue *q)
{
	return !q->in_flight || q->segs_in_flight < VMM_SEGS_BUDGET;
}

static bool take_next(struct vmm_queue *q, struct vmm_chain *chain)
{
	return quiet_kicks(q) && q->in_flight + q->untold < q->config.size && !take_chain(q, chain);
}

/* The chains before the fault are whole: they are served, and the next pop tells, without the driver's help. */
static int corrupt(struct vmm_queue *q, int n)
{
	q->broken = -EPROTO;
	if (!n)
		return -EPROTO;
	eventfd_write(q->kick_fd, 1);
	return n;
}

static int pop_available(struct vmm_queue *q, struct vmm_chain *out, int max, uint64_t bytes, bool arm)
{
	uint64_t taken = 0;
	int n = 0, waiting;

	while ((waiting = q->format->available(q)) || (arm && (waiting = arm_kicks(q)))) {
		if (waiting > 0 && (n == max || taken >= bytes || !may_take(q))) {
			q->starved = !may_take(q);
			return n;
		}
		if (waiting < 0 || !take_next(q, &out[n]))
			return corrupt(q, n);
		taken += out[n].readable + out[n].writable;
		n++;
	}
	return n;
}

/* Pop up to max chains, and none after those that ask for so many bytes: then, too, there may be more. */
int vmm_queue_pop_some(struct vmm_queue *q, struct vmm_chain *out, int max, uint64_t bytes, bool arm)
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
	if (q->broken)
		n = q->broken;
	else if (!held_back(q))
		n = pop_available(q, out, max, bytes, arm);
	if (n <= 0 && memory_lost(q))
		n = q->broken = -EIO;
out:
	if (q->held && !interrupt && (!q->in_flight || held_long(q)))
		interrupt = tell_held(q);
	pthread_mutex_unlock(&q->lock);
	if (interrupt)
		send_interrupt(q);
	return n;
}

/*
 * Pop up to max chains.  0: none, and a doorbell will come; max: there may be more.  -EPROTO: the ring is corrupt,
 * -EFAULT: it lies in memory without a file descriptor, -EIO: guest memory is gone; they stay until the queue is
 * stopped.  A queue whose areas are not mapped at the moment is parked: 0, and it is looked at again after the next map.
 */
int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *out, int max)
{
	return vmm_queue_pop_some(q, out, max, UINT64_MAX, true);
}

/* The same for whoever looks again by himself: no doorbell is asked for. */
int vmm_queue_poll(struct vmm_queue *q, struct vmm_chain *out, int max)
{
	return vmm_queue_pop_some(q, out, max, UINT64_MAX, false);
}

/*
 * A doorbell came, but the ring reads as if it had never been touched: memory whose file descriptor we were given but
 * whose contents the guest does not share (share=off) looks like this.
 */
bool vmm_queue_looks_unshared(struct vmm_queue *q)
{
	bool suspicious = false;

	pthread_mutex_lock(&q->lock);
	if (q->started && !q->broken && !q->saw_chain && !q->parked && q->generation == q->device->memory.generation)
		suspicious = q->format->untouched(q);
	pthread_mutex_unlock(&q->lock);
	return suspicious;
}

/* Which life of the queue this is: they are counted by starts. */
uint32_t vmm_queue_epoch(struct vmm_queue *q)
{
	pthread_mutex_lock(&q->lock);
	uint32_t epoch = q->epoch;
	pthread_mutex_unlock(&q->lock);
	return epoch;
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
	if (q->started || !n || n > q->max_size || (!config->packed && n & (n - 1)))
		goto out;
	error = -ENOMEM;
	if (!q->slots && !make_slots(q))
		goto out;
	q->config = *config;
	q->format = config->packed ? &vmm_packed_format : &vmm_split_format;
	q->holes = vmm_sigbus_holes();
	q->lost = false;
	error = -EIO;
	if (vmm_memory_holed(&q->device->memory))
		goto out;
	q->format->lay_out(q);
	error = find_areas(q);
	if (error)
		goto out;
	q->next_avail = q->next_used = 0;
	q->parked = q->starved = q->saw_chain = q->kicks_off = false;
	q->broken = 0;
	q->epoch++;
	atomic_store(&q->vector, config->vector);
	error = -EPROTO;
	if (!q->format->begin(q))
		goto out;
	error = 0;
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
	forget_ended(q);
	forget_held(q);
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

/*
 * Stop popping for a reason; returns what is still in flight.  drained_fd is written when that reaches 0.  From now on
 * no interrupt is held back.
 */
uint32_t vmm_queue_pause(struct vmm_queue *q, uint32_t reason)
{
	pthread_mutex_lock(&q->lock);
	q->pause |= reason;
	bool interrupt = tell_held(q);
	uint32_t busy = vmm_queue_busy_locked(q) - interrupt;
	pthread_mutex_unlock(&q->lock);
	if (interrupt)
		send_interrupt(q);
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
