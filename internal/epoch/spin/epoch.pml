/*
 * Model of internal/epoch: readers that enter and leave, writers that unpublish and retire, the worker
 * that frees. The labels are the steps of the Go code, which names them at the same places; a Go test
 * compares the two lists, runs the checker, and shows that each broken variant below fails.
 *
 * Checked, over every interleaving: no reader uses a freed object (assert in R_USE); nobody waits for ever
 * (an invalid end state); and in the end everything unpublished is freed, and nothing is left marked.
 *
 * A processor's store buffer is part of the model, since it is what fences are about. A reader's stores go
 * through one and reach the others at any later time, in order; its loads do not wait for them. Whatever is a
 * locked instruction, or happens under the mutex, drains it. The writers' side has locked instructions
 * only. FENCE is membarrier(2): it drains the buffer of one reader after the other. With -DFENCED the readers use
 * locked instructions too and FENCE is nothing: the other mode of the Go code.
 *
 * Broken variants, each by -D: ANNOUNCE_LATE, LEAVE_EARLY (readers that do it wrong), RETIRE_EARLY (a writer
 * that does), LOOK_BEFORE_TAKE, OLD_PARTICIPANTS, NO_FENCE, CHECK_BEFORE_MARK, NO_MARK_FENCE,
 * NO_WAKE, END_UNLOCKED.
 *
 * Not in the model: the report of a stall, whose timer also looks again, so that a lost wake-up here
 * is a delay there; Checkpoint, which is R_EXIT and R_ENTER where R_LOOK finds a mark; Throttle.
 */

#define READERS 2
#ifndef ROUNDS
#define ROUNDS  2	/* sections per reader */
#endif
#ifndef RETIRES
#define RETIRES 1	/* replacements by the writer that retires */
#endif
#ifndef SYNCS
#define SYNCS   1	/* is there a writer that calls Synchronize */
#endif
#define OBJECTS 4	/* one published at first, one by each replacement */
#define WAITERS 2	/* the worker and one caller of Synchronize */

#define BIT(r)    (1 << (r))
#define HAS(s, r) (((s) >> (r)) & 1)

byte cur;		/* the published object */
byte fresh = 1;		/* the next that nobody has seen */
bool freed[OBJECTS];

byte count[READERS];	/* as the others see it */
byte buffered[READERS];	/* increments of count that they do not see yet */
byte watched[READERS];
byte participants;	/* set of readers */

byte retired;		/* set of objects */
bool working;		/* there is a worker */
bool waiting[WAITERS], woken[WAITERS];

#define DRAIN(r) count[r] = count[r] + buffered[r]; buffered[r] = 0

#ifdef FENCED
#define STORE(r) count[r]++
#define FENCE    skip
#else
#define STORE(r) buffered[r]++
#define FENCE    atomic { DRAIN(0) }; atomic { DRAIN(1) }
#endif

#ifdef NO_FENCE
#define LOOK_FENCE skip
#else
#define LOOK_FENCE FENCE
#endif
#ifdef NO_MARK_FENCE
#define MARK_FENCE skip
#else
#define MARK_FENCE FENCE
#endif

/* A store buffer drains by itself, sooner or later. */
active proctype drain()
{
end:	do
	:: atomic { buffered[0] > 0 -> buffered[0]--; count[0]++ }
	:: atomic { buffered[1] > 0 -> buffered[1]--; count[1]++ }
	od
}

proctype reader(byte r)
{
	byte x, n;

P_REGISTER:
	participants = participants | BIT(r);
	do
	:: n == ROUNDS -> break
	:: n < ROUNDS ->
		n++;
#ifdef ANNOUNCE_LATE
R_READ:		x = cur;
R_ENTER:	STORE(r);
#else
R_ENTER:	STORE(r);
R_READ:		x = cur;
#endif
#ifdef LEAVE_EARLY
R_EXIT:		STORE(r);
R_USE:		assert(!freed[x]);
#else
R_USE:		assert(!freed[x]);
R_EXIT:		STORE(r);
#endif
		x = 0;
R_LOOK:		if
		:: watched[r] == 0
		:: watched[r] != 0 ->
R_WAKE:			atomic {
				DRAIN(r);
#ifndef NO_WAKE
				if :: waiting[0] -> woken[0] = true :: else fi;
				if :: waiting[1] -> woken[1] = true :: else fi;
#endif
			}
		fi
	od;
P_UNREGISTER:
	atomic { DRAIN(r); participants = participants & ~BIT(r) }
}

/*
 * A grace period, in two halves as in the Go code: LOOK finds who is inside, WAIT waits for them. `all` and `in`
 * are sets of readers, at[] is what each one's count was.
 */
#define LOOK_AT(r)  if :: HAS(all, r) && (count[r] & 1) -> in = in | BIT(r); at[r] = count[r] :: else fi
#define MARK(r)     if :: HAS(in, r) -> watched[r]++ :: else fi
#define CHECK(r)    if :: HAS(in, r) && count[r] != at[r] -> in = in & ~BIT(r); at[r] = 0; UNMARK(r) :: else fi
#ifdef CHECK_BEFORE_MARK
#define UNMARK(r)   if :: marked -> watched[r]-- :: else fi
#else
#define UNMARK(r)   watched[r]--
#endif

inline LOOK(all)
{
	in = 0;
G_FENCE:
	LOOK_FENCE;
G_LOOK:
	atomic { LOOK_AT(0) };
	atomic { LOOK_AT(1) }
}

inline WAIT(w)
{
	if
	:: in == 0
	:: in != 0 ->
G_WAIT:		waiting[w] = true;
#ifdef CHECK_BEFORE_MARK
		atomic { CHECK(0) };
		atomic { CHECK(1) };
G_MARK:		atomic { MARK(0) };
		atomic { MARK(1); marked = true };
G_MARK_FENCE:	MARK_FENCE;
		if :: in != 0 -> goto G_SLEEP :: else -> goto G_DONE fi;
#else
G_MARK:		atomic { MARK(0) };
		atomic { MARK(1) };
G_MARK_FENCE:	MARK_FENCE;
#endif
G_CHECK:	atomic { CHECK(0) };
		atomic { CHECK(1) };
		if
		:: in == 0
		:: in != 0 ->
G_SLEEP:		atomic { woken[w] -> woken[w] = false };
			goto G_CHECK
		fi;
G_DONE:		atomic { waiting[w] = false; woken[w] = false }
	fi
}

proctype worker()
{
	byte all, in, at[READERS], batch;
#ifdef CHECK_BEFORE_MARK
	bool marked;
#endif
#ifdef OLD_PARTICIPANTS
	byte old = participants;
#endif

G_TAKE:
#ifdef LOOK_BEFORE_TAKE
	all = participants;
	LOOK(all);
#endif
	atomic {
		batch = retired; retired = 0;
#ifndef END_UNLOCKED
		if :: batch == 0 -> working = false :: else fi
#endif
	};
	if
	:: batch == 0 ->
G_END:
#ifdef END_UNLOCKED
		working = false;
#endif
		goto ended
	:: else
	fi;
#ifndef LOOK_BEFORE_TAKE
G_SNAPSHOT:
#ifdef OLD_PARTICIPANTS
	all = old;
#else
	all = participants;
#endif
	LOOK(all);
#endif
	WAIT(0);
G_FREE:
	atomic {
		if :: HAS(batch, 0) -> freed[0] = true :: else fi;
		if :: HAS(batch, 1) -> freed[1] = true :: else fi;
		if :: HAS(batch, 2) -> freed[2] = true :: else fi;
		if :: HAS(batch, 3) -> freed[3] = true :: else fi;
		batch = 0
#ifdef CHECK_BEFORE_MARK
		; marked = false
#endif
	};
	goto G_TAKE;
ended:	skip
}

/* A writer that retires. */
proctype retirer()
{
	byte old, n;

	do
	:: n == RETIRES -> break
	:: n < RETIRES ->
		n++;
#ifdef RETIRE_EARLY
		old = cur; /* with SYNCS 0: nobody else takes it away */
#else
W_UNPUBLISH:	atomic { old = cur; cur = fresh; fresh++ };
#endif
W_RETIRE:	atomic {
			retired = retired | BIT(old);
			if :: !working -> working = true; run worker() :: else fi
		}
#ifdef RETIRE_EARLY
W_UNPUBLISH:	atomic { cur = fresh; fresh++ };
#endif
	od
}

/* A writer that calls Synchronize and frees. */
proctype synchronizer()
{
	byte all, in, at[READERS], old;
#ifdef CHECK_BEFORE_MARK
	bool marked;
#endif

W_UNPUBLISH:
	atomic { old = cur; cur = fresh; fresh++ };
G_SNAPSHOT:
	all = participants;
	LOOK(all);
	WAIT(1);
G_FREE:
	freed[old] = true
}

init
{
	byte i;

	atomic {
		run reader(0); run reader(1);
		run retirer();
		if :: SYNCS -> run synchronizer() :: else fi
	}
	_nr_pr == 2 && buffered[0] + buffered[1] == 0 -> /* drain and this */
	atomic {
		for (i : 0 .. OBJECTS - 1) {
			assert(i >= fresh || freed[i] == (i != cur))
		}
		assert(watched[0] + watched[1] == 0 && !waiting[0] && !waiting[1] && participants == 0)
	}
}
