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
//! quarantined by punching it out and giving the freed block to the file's *ledger*, where it keeps what was rescued; repair
//! is the reverse, and MADV_COLLAPSE then puts the 2 MiB mapping back.
//!
//! # The processes and where things are
//!
//! ```text
//!   mount.hugetlb2 pool0 /mnt/h2 -o size=64G        opens /dev/fuse, starts the daemon, mount(2)s when the pool is filled,
//!     |                                             returns when the filesystem serves
//!     +-- hugetlb2fsd                               serves FUSE in a mount namespace with an empty root of its own:
//!           /index/tree          the tree that users see: names, owners, modes, times, links, attributes, as the inodes of one
//!                                private tmpfs
//!           /index/.orphans      files without a name that are still open or mapped
//!           /objects/<node id>   a sealed file for each regular file: data, ledger
//!           (reserve)            a sealed file for each NUMA node: the pool's free memory
//!           /proc, /sys
//! ```
//!
//! **The daemon keeps no state of its own.** Names are the index's, sizes and memory the objects', quarantines the ledgers', free
//! pages the reserves'. A node id is the file handle of the inode in the index. What is in the daemon's tables can be read off
//! these again.
//!
//! # Invariants
//!
//! - **S1** ([`sealed`]) A sealed file has no free block, except inside a resize and for the microseconds of a quarantine or repair.
//! - **P1** ([`pool`]) Pages of files + pages that are reserved + free pages = the pool's size; and so in bytes of memory.
//! - **P2** ([`fs`]) Every object belongs to a regular file of the index; a file without an object is empty.
//! - **Q1** ([`sealed`]) A soft hole has exactly one record in the ledger, and the other way round.
//!
//! `hugetlb2 check` verifies them on a pool in use.
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

pub mod options;

pub mod sys;

pub mod sealed;

pub mod pool;

pub mod quarantine;

pub mod index;

pub mod fs;

pub mod agents;

pub mod fuse;

pub mod control;

pub mod logging;

pub mod worker;
