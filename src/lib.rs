//! hugetlb2fs: a filesystem of gigantic pages on an unmodified kernel.
//!
//! It is mounted like hugetlbfs from a pool of memory that is taken at the mount. Programs mmap
//! files from it at native speed, and a memory error costs 4 KiB instead of 1 GiB. README.md says
//! what it is for, docs/SEMANTICS.md what programs see, docs/FORMAT.md what outlives a process.
//! This page says how it works, where things are, and what the words mean.
//!
//! # The idea
//!
//! A FUSE server can tell the kernel which *backing file* a program sees that maps one of its
//! files (passthrough, Linux 6.9). The backing files here are files on tmpfs in 2 MiB folios,
//! which the kernel maps by PMD entries. The server takes no part in a page fault.
//!
//! Every file has **a tmpfs superblock of its own, all of whose blocks are taken** (a [`sealed`]
//! file). So nothing can fill a hole in such a file: a touch of the hole is SIGBUS in every
//! process that maps the file, without help of these processes. A subpage is quarantined in two
//! moves: the daemon copies its bytes to the file's *ledger*, and punches it out. A repair is the
//! reverse, and MADV_COLLAPSE then puts the 2 MiB mapping back.
//!
//! # The processes, and where things are
//!
//! ```text
//!   mount.hugetlb2 pool0 /mnt/h2 -o size=64G   opens /dev/fuse, starts the daemon, makes the
//!     |                                        filesystem when the pool is filled, and mounts it
//!     |                                        when the daemon serves (move_mount(2))
//!     +-- hugetlb2fsd                          the supervisor: holds the device and a mount
//!         |                                    namespace with an empty root of its own, restarts
//!         |                                    the worker, does nothing else
//!         +-- hugetlb2fsd                      the worker: serves FUSE; may die at any instruction
//!           /index/tree            the tree that users see, as the inodes of one private tmpfs
//!           /index/.orphans        nodes without a name that are still open or mapped
//!           /index/.witnesses      findings of requests that cannot be told from a second time
//!           /index/handover        options, and the terms of the session with the kernel
//!           /objects/<node id>     a sealed file for each regular file: data, ledger
//!           /doors/<node id>       the data of a file that programs have open by themselves
//!           /reserve/<node>        a sealed file for each NUMA node: the pool's free memory
//!           /proc, /sys
//! ```
//!
//! **The daemon keeps no state of its own.** Names are the index's, sizes and memory the objects',
//! quarantines the ledgers', free pages the reserves'. The kernel says which nodes it still refers
//! to. A node id is the file handle of the inode in the index. A worker can read all of its tables
//! off these again, and every worker but the first does.
//!
//! # The ways of a read and a write
//!
//! mmap(2) never comes to the daemon. write(2) always does, as it may need pages. read(2) does for
//! a descriptor that can write, too; for a descriptor that was opened for reading only, the kernel
//! can read the sealed file itself, as fast as tmpfs (option `io=`). Such a *native* reader would
//! see zeros in a soft hole, so a file has either soft holes or native readers
//! ([`fs::Fs::open_natively`]). The daemon answers large reads from its own mapping of the file,
//! without a copy ([`fs::Object::view`]).
//!
//! The threads that serve answer short requests at once and hand long ones to jobs ([`fuse`]). A
//! long change of a file is made in pieces, and gives way between two of them ([`fs::Pace`],
//! [`pool::Change`]).
//!
//! # A death
//!
//! When a worker dies, the kernel keeps every request that was not answered, and mappings do not
//! depend on the worker. The supervisor forks another, which opens the files that are there
//! ([`fs::Fs::open`]). Each change that takes several [`steps`] leaves enough to be finished or
//! undone ([`sealed`], [`pool::Holding`], [`pool`], [`index`]). Then the new worker takes the
//! session over and has the kernel send the requests again ([`fuse::Connection::take_over`]). It
//! answers a request that the dead worker had carried out as if it was carried out once
//! ([`fs::RequestContext`]). [`upgrade`] is the same with another supervisor.
//!
//! # No memory is left
//!
//! The pool has all memory that its files need. What the daemon asks the machine for besides, at a
//! mount, a resize or for a moment while memory moves ([`pool`]), is looked for before it is asked
//! for, and taken from any NUMA node. The kernel's OOM killer is never asked to make room
//! ([`sys::shortage`]): a call that finds none waits, and the worker ends in place of another
//! process.
//!
//! # Invariants
//!
//! - **S1** ([`sealed`]) A sealed file has no free block, with these exceptions: inside a resize;
//!   for the microseconds of a quarantine or repair; for gaps that a touch may fill, in a file
//!   without soft holes; while programs have the data open by themselves; and after MADV_REMOVE
//!   until the daemon has taken that memory back.
//! - **P1** ([`pool`]) For each NUMA node's part of the pool: pages of files + promised pages +
//!   free pages = the part's size. The same holds in bytes of memory, with the float. After a
//!   program has moved memory to another node, the agent of [`agents::policies`] moves the account
//!   or the memory within a while.
//! - **P2** ([`fs`]) Every object belongs to a regular file of the index. A file without an object
//!   is empty.
//! - **Q1** ([`sealed`]) A subpage is a soft hole if and only if the ledger's record of its folio
//!   names it. Then the ledger has the true copy of its bytes.
//!
//! `hugetlb2 check` verifies them on a pool in use. A new worker restores them.
//!
//! # Two facts about the kernel that shaped the code
//!
//! - tmpfs does not clear memory that fallocate(2) takes until a touch, and MADV_COLLAPSE does not
//!   count as a touch: it maps such a folio with the bytes of its former user. So the daemon takes
//!   memory that programs can reach by write faults, which clear it first. Memory behind a file's
//!   end stays in the reserve ([`sealed`], [`pool::Holding`]).
//! - ftruncate(2) of a tmpfs file to the size that it has frees the memory behind the end, and
//!   splits a folio for it.
//!
//! # A map of the code
//!
//! Each module uses only those above it in this list (`tests/tidy.rs` checks it).
//!
//! | module | holds | begin with |
//! |---|---|---|
//! | [`units`] | sizes and places as types, and their conversions | [`units::Range`] |
//! | [`error`] | the one error type and the table from error to errno | [`error::Error::errno`] |
//! | [`steps`] | names of steps after which a test has the worker die | [`steps::Step`] |
//! | [`faults`] | system calls that a test has fail | [`faults::Want`] |
//! | [`options`] | the one table of mount options | [`options::TABLE`] |
//! | [`attributes`] | the one table of extended attributes; counters | [`attributes::TABLE`] |
//! | [`sys`] | system calls, and the programs' `unsafe` | [`sys::tmpfs`] |
//! | [`placement`] | the NUMA nodes that a file's pages come from; pure | [`placement::choose`] |
//! | [`targets`] | the kinds of memory by NUMA node, and their order; pure | [`targets::best`] |
//! | [`logging`] | a log that never makes a call wait | [`logging::start`] |
//! | [`sealed`] | a sealed file: S1, Q1, quarantine, repair, the ledger | [`sealed::Sealed`] |
//! | [`pool`] | pages, moves of memory, a file's pages: P1 | [`pool::Holding`] |
//! | [`quarantine`] | the texts of ranges and requests; pure | [`quarantine::parse_repair`] |
//! | [`guard`] | soft quarantines as memory errors of the process itself | [`guard::watch`] |
//! | [`index`] | the tree of names | [`index::Index`] |
//! | [`fs`] | the filesystem as users see it, without FUSE: P2 | [`fs::Fs`] |
//! | [`agents`] | threads that nothing has asked: patrol, collapse and more | [`agents::patrol`] |
//! | [`fuse`] | FUSE to [`fs`] and back, jobs, the session | [`fuse::Connection`] |
//! | [`mount_protocol`] | the lines between mount helper and daemon | [`mount_protocol::Message`] |
//! | [`session_record`] | the session record | [`session_record::SessionRecord`] |
//! | [`supervisor`] | keeps a worker running | [`supervisor::supervise`] |
//! | [`worker`] | one life of a worker | [`worker::run`] |
//! | [`upgrade`] | takes a pool over from another daemon | [`upgrade::Predecessor`] |
//!
//! Beside the library: `src/main.rs` is hugetlb2fsd. `mount-helper/` is mount.hugetlb2,
//! umount.fuse.hugetlb2 and the command hugetlb2, which speak to a pool by its attributes alone.
//! `mount-helper/preload/` is the library that `hugetlb2 guard` loads into a program.
//! `tests/` has the tests on real mounts, `tests/lab/` those on a kernel with real memory errors,
//! `tests/programs/` programs of others, `benches/` the figures. `tests/run` runs them all.
//! `tests/support/` is their base, with the system calls that only tests make; `tests/toucher/` is
//! the process beside a test that maps a file.
//!
//! # Glossary
//!
//! A word means the same everywhere in the code, but for the words whose entry gives two meanings.
//!
//! Units:
//! - **page**: the grain of the pool, 1 GiB or 2 MiB (`pagesize=`).
//! - **folio**: 2 MiB of memory in one piece, mapped by one PMD entry.
//! - **subpage**: 4 KiB, the grain of mapping and of quarantine. **block**: 4 KiB as tmpfs counts.
//! - **run**: neighbours of one kind. **extent**: a part of a file in one state ([`fs::Extent`]);
//!   of a file that cannot be opened, its pages and bytes.
//!
//! Files:
//! - **node**: an inode of the index, known by its [`units::InodeId`]. **NUMA node**: memory beside
//!   one socket ([`units::NumaNode`]).
//! - **object**: the contents of one regular file ([`fs::Object`]). **holding**: an object's pages
//!   ([`pool::Holding`]). **sealed file**: a holding's memory ([`sealed::Sealed`]).
//! - **data**: the file of a sealed file that programs map. **ledger**: the file beside it, with
//!   the bytes of quarantined subpages. **record**: what the ledger says of one folio.
//! - **superblock**: that of a tmpfs. **header**: the 40 bytes in which a sealed file describes
//!   itself ([`sealed::Header`]).
//! - **door**: a mount of a file's data alone, through which programs have the data open by
//!   themselves, without FUSE; **holder**: such a program ([`fs::Fs::close_unused_doors`]).
//! - **place**: where an object's superblock is mounted, `/objects/<node id>`; of bytes in the
//!   ledger, where it keeps them.
//! - **orphan**: a node without a name that the kernel still knows. **stranded**: an object whose
//!   node is gone, and whose memory has yet to move back.
//!
//! Memory and pages:
//! - **placement**: the NUMA nodes that a file's pages want: in words, or **resolved** for one
//!   growth ([`placement`]). **wish**: the nodes that the words mean, without `strict:`.
//! - **target**: the memory of a NUMA node, as a program may choose it; **initiator**: a node from
//!   which programs reach it ([`targets`]).
//! - **pool**: all pages, and the account of them. **part**: the pages of the pool on one NUMA
//!   node. **home**: the node whose part has a page. **reserve**: the free memory of a part.
//!   **misplaced**: a page whose home is not as wished. **displaced**: a page whose memory a
//!   program has moved away from its home.
//! - **ahead**: pages of a file behind its end that no program has asked for, with cleared memory.
//!   **ready**: a file without a name that has such pages; **shelf**: the ready files; **lent**: a
//!   ready file that has become the object of a new file; **steward**: the thread of a NUMA node
//!   that makes them ([`fs`], [`agents::steward`]).
//! - **promised**: pages in a **token**, which no other change can have. **span**: of a file, the
//!   pages from its start on that are its own or released.
//! - **plan**, **transfer**: the parts of a file that get memory, each from one reserve.
//! - **float**: memory that each part holds beyond its pages, at stake while a **piece** moves.
//!   **short**: bytes that the pool lacks of both. **missing**: free pages that are not handed
//!   out, as more is short than the float.
//! - **take**, **give**: a sealed file gets memory, or loses it. **move**: one gives, another
//!   takes.
//! - **change**: of a file's pages, in pieces. **settle**: to finish or undo a change that was
//!   stopped half-way.
//!
//! Parts of a file without memory:
//! - **hole**, or **soft hole**: a quarantined subpage that was punched out; S1 keeps it shut.
//! - **stray**: a hole that a touch has filled while a block was free; it is shut again.
//! - **released**: a page that was punched and went back to the pool. A touch is SIGBUS.
//! - **punched**: with `punch=keep`, a part whose memory the machine has until the next touch.
//! - **removed**: a part that a program took out by MADV_REMOVE, without a request.
//! - **gap**: any part with a free block for its next touch: punched or removed.
//!
//! Quarantine:
//! - **quarantined**, or **lost**: no program can reach the subpage's bytes. **soft**: by a
//!   request. **hw**: by a memory error that the kernel has met.
//! - **poisoned**: quarantined, in the texts of the attributes. The word is the kernel's
//!   (HWPoison).
//! - **repair**: to put a healthy subpage back, with zeros, or with the bytes that are known
//!   (**salvage**). **collapse**: to make a folio one piece again, and its mappings huge.
//! - **pinned**: a folio that the kernel cannot split, as a device or a pipe refers to it.
//! - **alarm**: the quarantine has grown since a program last read the list (POLLPRI).
//!
//! Processes and requests:
//! - **daemon**: a **supervisor** and its **worker**. **helper**: mount.hugetlb2.
//! - **request context**: a request of the kernel, with its number and its caller
//!   ([`fs::RequestContext`]). **resent**: the kernel sent it before, to a worker that died.
//! - **witness**: a note of what a request found, by which its second time can be told from the
//!   first. **attempt**: a note that a request was begun again.
//! - **native**: a descriptor that the kernel reads for. **mediated**: one that the daemon reads
//!   for.
//! - **backing number**: the number by which the kernel knows an object's data.
//! - **note**, **keep**: to write down for the next worker; docs/FORMAT.md lists where.
//! - **session record**: the options, and the terms of the session ([`session_record`]). **step**:
//!   a point after which a worker may die.
//! - **pace**: how a long request gives way. **patrol**: the agent that looks once a second.
//!
//! # To add something
//!
//! **An option.** A field of [`options::Options`] and a row of [`options::TABLE`]: mount helper,
//! daemon, help, remount and session record read that table. Use the field where [`fs::Fs`] is
//! made. Add a row to "Options" in docs/OPERATIONS.md (`tests/documents.rs` compares).
//!
//! **An attribute.** A variant of [`attributes::OfFile`], [`attributes::OfEntry`] or
//! [`attributes::OfRoot`] and a row of [`attributes::TABLE`]. The compiler then asks for the value
//! and for the request in `fs::attributes`. A grammar goes to [`quarantine`] or a module like
//! [`placement`], the command to `mount-helper/cli.rs`. Add a row to "Attributes" in README.md (a
//! test of [`attributes`] compares).
//!
//! **A counter.** A variant of [`attributes::Counter`], a line in `pool_text` of `fs::attributes`,
//! and a row of "Counters" in docs/OPERATIONS.md.
//!
//! **An agent.** A file in `agents`: `start` takes the [`fs::Fs`] and returns a value whose drop
//! stops the thread ([`agents::rounds`]). The thread only waits and calls; the decision is a
//! function of [`fs`] or below. [`faults::exempt`] keeps its system calls out of the tests' count.
//! `serve` in [`worker`] starts it once the filesystem is there.
//!
//! **A step.** See [`steps`]: a row, a call, and a situation in `tests/deaths.rs`.
//!
//! **A name or a byte that outlives a process.** A row in docs/FORMAT.md, and a situation in
//! `tests/format.rs`; the head of that document says which version to raise.

pub mod units;

pub mod error;

pub mod steps;

pub mod faults;

pub mod options;

pub mod attributes;

pub mod sys;

pub mod placement;

pub mod targets;

pub mod logging;

pub mod sealed;

pub mod pool;

pub mod quarantine;

pub mod guard;

pub mod index;

pub mod fs;

pub mod agents;

pub mod fuse;

pub mod mount_protocol;

pub mod session_record;

pub mod supervisor;

pub mod worker;

pub mod upgrade;
