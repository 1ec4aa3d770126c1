/*
 * The C core of vmmblk: guest memory, virtqueues, interrupts of one virtio device.
 *
 * Everything here faces a hostile driver and a hostile VMM.  The rules:
 *   - guest memory is read once into a private copy, the copy is checked, the copy is used;
 *   - a guest address becomes a host address only through vmm_translate(), or what chain.c does with vmm_region_near();
 *   - no cached translation outlives a change of the memory map (the map's generation tells).
 *
 * Threads.  One thread per queue pops and completes; the transport thread maps, unmaps, pauses and orphans.  Each
 * queue has a lock; the memory map changes only with the locks of all queues held, so whoever holds one queue's lock
 * may read the map.  An interrupt is raised with no queue lock held: its sink takes the transport's lock, and the
 * transport thread takes queue locks while it holds that one.
 */
#ifndef VMMBLK_CORE_H
#define VMMBLK_CORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define VMM_MAX_REGIONS 256
#define VMM_CHAIN_MIN_LIMIT 1024	/* descriptors in one chain, or the queue size if that is more */
#define VMM_SEGS_SLACK 64		/* extra segments that region boundaries may cost one chain */
#define VMM_SEGS_BUDGET (1u << 18)	/* segments of all the chains in flight of one queue */
#define VMM_HEADER_SIZE 16
#define VMM_NO_VECTOR 0xffffu

/*
 * A piece of a request's data: where it lies in one alias (a host mapping of a guest region), and its host address,
 * which is good until the chain is completed.
 */
struct vmm_seg {
	uint32_t alias;
	uint32_t len;
	uint64_t offset;
	uint8_t *host;
};

enum {
	VMM_CHAIN_NO_STATUS = 1,	/* no device-writable byte: nothing can be told, used length 0 */
	VMM_CHAIN_UNREACHABLE = 2,	/* some of the data cannot be reached: fail the request */
	VMM_CHAIN_NO_FD = 4,		/* ... because its memory came without a file descriptor */
};

/*
 * A popped chain.  segs is the queue's and valid until the chain is completed; first the readable ones.  Whoever knows
 * a chain only by a copy of this finds the first of them here as well.
 */
struct vmm_chain {
	uint32_t token;
	uint32_t flags;
	uint32_t error;			/* errno of the engine that tried to serve it, 0 if none did or none failed */
	uint32_t header_len;
	uint8_t header[VMM_HEADER_SIZE];
	uint32_t readable_segs;
	uint32_t writable_segs;
	uint64_t readable;		/* bytes after the header */
	uint64_t writable;		/* bytes before the status byte */
	const struct vmm_seg *segs;
	struct vmm_seg first;
};

/* What the disk takes: whole sectors of its own, inside it, from memory that is aligned so. */
struct vmm_terms {
	uint32_t sector_size, alignment;
	uint64_t sectors;
	bool writable;
};

/* A read or write in one piece that is within these terms: all there is to know of it. */
enum { VMM_NOT_PLAIN, VMM_PLAIN_READ, VMM_PLAIN_WRITE };

struct vmm_plain {
	uint32_t token;
	uint32_t kind;			/* VMM_NOT_PLAIN: what follows means nothing */
	uint32_t alias;
	uint32_t written;		/* to guest memory, if all goes well */
	uint64_t sector;		/* the disk's own */
	uint64_t start, end;		/* of the data in the alias */
};

struct vmm_completion {
	uint32_t token;
	uint32_t status;
	uint32_t written;		/* leading bytes of the writable data that were written */
};

struct vmm_queue_config {
	uint32_t size;
	uint32_t vector;
	uint64_t desc, driver, device;
	bool event_idx, indirect, packed, in_order;
};

/* One mapped guest region.  addr is the core's own mapping (an alias of the transport's), NULL without a fd. */
struct vmm_region {
	uint64_t iova, size;
	uint8_t *addr;
	uint32_t alias;
	uint32_t prot;
	uint8_t *map_base;		/* start of the core's mapping; addr lies in it */
	size_t map_len;
	size_t page_size;
	int guard;			/* its entry in the table of the SIGBUS handler */
	void *source;			/* the transport's mapping, for making a fresh alias */
};

struct vmm_memory {
	struct vmm_region regions[VMM_MAX_REGIONS];	/* sorted by iova, disjoint */
	uint32_t count;
	uint32_t next_alias;
	uint64_t generation;
};

/* What Python must know of an alias: id, and the bytes of the region in it.  old is the one it replaces, or 0. */
struct vmm_alias {
	uint32_t id;
	uint32_t old;
	uint32_t prot;
	uint64_t iova, size;
	uint64_t addr;
	uint64_t map_base, map_len;
};

enum {				/* reasons why a queue does not pop, a bit each */
	VMM_PAUSE_QUIESCE = 1,
	VMM_PAUSE_RESET = 2,
	VMM_PAUSE_BUS_MASTER = 4,
	VMM_PAUSE_STOP = 8,
	VMM_PAUSE_ORPHAN = 16,
	VMM_PAUSE_SUSPEND = 32,
};

enum slot_state {
	SLOT_FREE,
	SLOT_IN_FLIGHT,
	SLOT_ORPHANED,
	SLOT_UNTOLD,			/* an orphan that ended while the driver's memory was not there to say so */
};

struct slot {
	uint8_t state;
	uint16_t generation;
	uint16_t head;			/* what the driver knows the chain by: its first descriptor, or its buffer id */
	uint16_t ring_slots;		/* how many slots of a packed ring it takes */
	uint32_t epoch;			/* the queue's when the chain was popped */
	bool has_status;
	uint64_t status_iova;
	uint64_t writable;
	struct vmm_seg *segs;
	uint32_t nr_segs, max_segs, readable_segs;
	uint32_t next;			/* in the list of those that are free, or of those that are untold */
};

struct area {
	uint64_t iova;
	uint64_t len;
	size_t align;
	int prot;
	uint8_t *host;			/* NULL when it straddles regions: then each access is translated */
};

struct vmm_device;
struct vmm_ring_format;

struct vmm_queue {
	pthread_mutex_t lock;
	struct vmm_device *device;
	struct vmm_queue_config config;
	const struct vmm_ring_format *format;
	bool started;
	int broken;			/* what every pop answers until the queue is stopped, 0 while all is well */
	bool parked;			/* its areas are not mapped at the moment */
	bool starved;			/* chains wait until others have completed */
	bool lost;			/* some of guest memory is gone: what moved since is nobody's */
	uint32_t holes;			/* what vmm_sigbus_holes() said when that was looked at */
	uint32_t pause;
	uint32_t epoch;			/* counts starts */
	uint32_t in_flight, orphans, untold;
	uint32_t notifying;		/* completers on their way to the interrupt sink */
	uint32_t segs_in_flight;
	uint32_t near;			/* number of the region in which something was found last: only a guess */
	uint64_t generation;		/* of the memory map that the areas below were translated with */
	struct area desc, driver, used;
	uint16_t next_avail, next_used;	/* positions, as the format counts them */
	uint16_t avail_idx;		/* a split ring's available index when it was last looked at */
	bool kicks_off;			/* the driver was told that doorbells are not needed */
	bool saw_chain;
	struct slot *slots;
	uint32_t max_size, free_slot;
	uint32_t first_untold, *untold_end;	/* in the order in which they ended, and where the next is linked */
	int kick_fd;
	atomic_uint vector;
	uint32_t held;			/* completions since the interrupt that is held back, 0: none is */
	uint16_t held_from;		/* the used position before them */
	_Atomic uint64_t held_until;	/* when it is raised at the latest, ns of CLOCK_MONOTONIC; 0 if none is held back */
	int timer_fd;			/* -1: none is ever held back */
	uint64_t timer_until;		/* what timer_fd is set to, 0: to nothing */
};

typedef void (*vmm_irq_sink)(void *arg, uint32_t vector);

struct vmm_device {
	struct vmm_memory memory;
	uint32_t nr_queues;
	int drained_fd;
	atomic_uint orphans;
	atomic_uint isr;
	atomic_bool msix, intx_disabled;
	atomic_uint config_vector;
	uint32_t coalesce_count;	/* completions that share an interrupt, 0: however many come together */
	uint64_t coalesce_ns;
	vmm_irq_sink sink;
	void *sink_arg;
	struct vmm_queue queues[];
};

static inline uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* Whether an interrupt is held back: only then vmm_queue_tell() has something to do. */
static inline bool vmm_queue_holds(const struct vmm_queue *q)
{
	return atomic_load_explicit(&q->held_until, memory_order_relaxed);
}

/* memory.c */
void vmm_sigbus_install(void);
uint32_t vmm_sigbus_holes(void);
bool vmm_memory_holed(const struct vmm_memory *m);
struct vmm_region *vmm_region_find(struct vmm_memory *m, uint64_t iova);
uint8_t *vmm_region_reach(const struct vmm_region *r, uint64_t iova, uint64_t len, int prot);
uint8_t *vmm_translate(struct vmm_memory *m, uint64_t iova, uint64_t len, int prot);
int vmm_memory_map(struct vmm_memory *m, uint64_t iova, uint64_t size, uint64_t vaddr, uint64_t map_base,
		   uint64_t map_len, uint64_t page_size, uint32_t prot, struct vmm_alias *out);
int vmm_memory_unmap(struct vmm_memory *m, uint64_t iova, uint64_t size, uint32_t *alias);
int vmm_alias_swap(struct vmm_memory *m, struct vmm_region *r, uint8_t *stand_in, struct vmm_alias *out);
void vmm_alias_release(uint64_t map_base, uint64_t map_len);

/* chain.c */
int vmm_chains_plain(const struct vmm_chain *chains, int n, const struct vmm_terms *terms, struct vmm_plain *out,
		     struct vmm_completion *good);

/* queue.c: those below with the queue's lock held */
void vmm_queue_orphan_locked(struct vmm_queue *q);
uint32_t vmm_queue_busy_locked(const struct vmm_queue *q);

/* queue.c, device.c: the face that Python sees, see core.cdef */
int vmm_queue_start(struct vmm_queue *q, const struct vmm_queue_config *config);
void vmm_queue_stop(struct vmm_queue *q);
int vmm_queue_pop(struct vmm_queue *q, struct vmm_chain *out, int max);
int vmm_queue_poll(struct vmm_queue *q, struct vmm_chain *out, int max);
int vmm_queue_pop_some(struct vmm_queue *q, struct vmm_chain *out, int max, uint64_t bytes, bool arm);
int vmm_queue_complete(struct vmm_queue *q, const struct vmm_completion *done, int n);
int vmm_queue_timer(const struct vmm_queue *q);
void vmm_queue_tell(struct vmm_queue *q, bool sleep);
bool vmm_queue_looks_unshared(struct vmm_queue *q);
uint32_t vmm_queue_epoch(struct vmm_queue *q);
void vmm_queue_set_vector(struct vmm_queue *q, uint32_t vector);
uint32_t vmm_queue_pause(struct vmm_queue *q, uint32_t reason);
void vmm_queue_resume(struct vmm_queue *q, uint32_t reason);
uint32_t vmm_queue_busy(struct vmm_queue *q);

struct vmm_device *vmm_device_new(uint32_t nr_queues, uint32_t queue_size_max, int drained_fd);
void vmm_device_free(struct vmm_device *d);
struct vmm_queue *vmm_device_queue(struct vmm_device *d, uint32_t index, int kick_fd);
int vmm_device_coalesce(struct vmm_device *d, uint32_t count, uint64_t ns);
void vmm_device_irq_sink(struct vmm_device *d, uint64_t function, uint64_t arg);
void vmm_device_set_msix(struct vmm_device *d, bool on);
void vmm_device_set_intx_disabled(struct vmm_device *d, bool disabled);
void vmm_device_set_config_vector(struct vmm_device *d, uint32_t vector);
void vmm_device_config_interrupt(struct vmm_device *d);
void vmm_device_intx_again(struct vmm_device *d);
uint32_t vmm_device_isr_take(struct vmm_device *d);
uint32_t vmm_device_isr_peek(struct vmm_device *d);
int vmm_device_map(struct vmm_device *d, uint64_t iova, uint64_t size, uint64_t vaddr, uint64_t map_base,
		   uint64_t map_len, uint64_t page_size, uint32_t prot, struct vmm_alias *out);
int vmm_device_unmap(struct vmm_device *d, uint64_t iova, uint64_t size, uint32_t *alias);
uint32_t vmm_device_pause(struct vmm_device *d, uint32_t reason);
void vmm_device_resume(struct vmm_device *d, uint32_t reason);
uint32_t vmm_device_busy(struct vmm_device *d);
uint32_t vmm_device_orphans(struct vmm_device *d);
int vmm_device_orphan(struct vmm_device *d, struct vmm_alias *fresh, int *n);
void vmm_device_notify_queue(struct vmm_device *d, uint32_t vector);

#endif
