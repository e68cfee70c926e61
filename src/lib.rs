//! hugetlb2fs: a filesystem of gigantic pages with the semantics that "hugetlb v2" was to have, on an unmodified kernel.
//!
//! It is mounted like hugetlbfs from a pool of memory that was taken beforehand, programs mmap files from it at native speed, and
//! a memory error costs 4 KiB instead of 1 GiB. The README says what users see; this page is how it works.
//!
//! # The idea
//!
//! A FUSE server can tell the kernel which *backing file* a program that maps one of its files gets to see (passthrough, Linux
//! 6.9). Ours are files on tmpfs in 2 MiB folios, mapped by PMD entries, and the server is not involved in a fault.
//! Every file has **a tmpfs superblock of its own, all of whose blocks are taken** (a [`sealed`] file). A hole in such a file
//! cannot be filled by anyone: to touch it is SIGBUS, in every process that maps it, without their help. So a bad subpage is
//! quarantined by copying it to the file's *ledger* and punching it out; repair is the reverse, and MADV_COLLAPSE then
//! puts the 2 MiB mapping back.
//!
//! # The processes and where things are
//!
//! ```text
//!   mount.hugetlb2 pool0 /mnt/h2 -o size=64G        opens /dev/fuse, starts the daemon, makes the filesystem when the pool
//!     |                                             is filled, and mounts it when the daemon serves (move_mount(2))
//!     +-- hugetlb2fsd                               the supervisor: holds the device and a mount namespace with an empty root
//!         |                                         of its own, restarts the worker, does nothing else
//!         +-- hugetlb2fsd                           the worker: serves FUSE; may die at any instruction
//!           /index/tree          the tree that users see: names, owners, modes, times, links, attributes, as the inodes of one
//!                                private tmpfs
//!           /index/.orphans      what has no name and is still open or mapped
//!           /index/.witnesses    what requests found that cannot be told from a second time ([`fs`])
//!           /index/handover      options, and what was agreed on with the kernel ([`handover`])
//!           /objects/<node id>   a sealed file for each regular file: data, ledger
//!           /reserve/<node>      a sealed file for each NUMA node: the pool's free memory
//!           /proc, /sys
//! ```
//!
//! **The daemon keeps no state of its own.** Names are the index's, sizes and memory the objects', quarantines the ledgers', free
//! pages the reserves'; what the kernel still refers to is the kernel's to say. A node id is the file handle of the inode in the
//! index. What is in the daemon's tables can be read off these again, and is, by every worker but the first.
//!
//! # Who reads and writes
//!
//! mmap(2) never comes here. write(2) always does, as it may need pages. read(2) does for a descriptor that can write, too; one for
//! reading only can have the kernel read the sealed file itself, as fast as tmpfs (option `io=`). To such a reader a soft hole would be
//! zeros, so a file has either soft holes or such readers ([`fs::Fs::open_natively`]). Of what does come here, large reads are
//! delivered from where the file is mapped in the worker, without a copy ([`fs::Object::view`]).
//!
//! # A death
//!
//! When a worker dies, the kernel keeps every request that it has not answered, and mappings are none of its business anyway. The
//! supervisor forks another, which opens what is there ([`fs::Fs::open`]): each change that takes several steps ([`steps`]) can
//! be finished or undone from what it has left ([`sealed`], [`pool::Holding`], [`pool`], [`index`]). Then it takes the session over
//! and has the kernel send the requests again ([`fuse::Connection::take_over`]); those that had been carried out
//! are answered as if they were carried out once ([`fs::Ticket`]). [`upgrade`] is the same with another supervisor.
//!
//! # Invariants
//!
//! - **S1** ([`sealed`]) A sealed file has no free block, except inside a resize, for the microseconds of a quarantine or repair, for
//!   what was punched to be filled by a touch where the file has no soft holes, and after MADV_REMOVE until that memory is
//!   taken back.
//! - **P1** ([`pool`]) Pages of files + pages that are reserved + free pages = the pool's size; and so in bytes of memory, with the float.
//! - **P2** ([`fs`]) Every object belongs to a regular file of the index; a file without an object is empty.
//! - **Q1** ([`sealed`]) A subpage is a soft hole if and only if the ledger's record of its folio names it; then the ledger has the
//!   true copy of its bytes.
//!
//! `hugetlb2 check` verifies them on a pool in use; a new worker restores them.
//!
//! # Two facts about the kernel that shaped the code
//!
//! - tmpfs does not clear memory that fallocate(2) takes until it is touched, and MADV_COLLAPSE does not count as a touch:
//!   it maps such a folio with its former user's bytes in it. So memory that programs can reach is taken by write faults, which
//!   clear it first; memory that lies behind a file's end stays in the reserve (see [`sealed`] and [`pool::Holding`]).
//! - Setting a tmpfs file's size to what it is already frees the memory behind the end and splits a folio for it.
//!
//! # Layers
//!
//! Each module uses only those above it in this list (`tests/tidy.rs` checks it).

pub mod units;

pub mod error;

pub mod steps;

pub mod faults;

pub mod options;

pub mod sys;

pub mod logging;

pub mod sealed;

pub mod pool;

pub mod quarantine;

pub mod index;

pub mod fs;

pub mod agents;

pub mod fuse;

pub mod control;

pub mod handover;

pub mod supervisor;

pub mod worker;

pub mod upgrade;
