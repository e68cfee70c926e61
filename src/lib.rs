//! hugetlb2fs (work in progress head)
pub mod units;
pub mod error;
pub mod sys;
pub mod sealed;
pub mod options;
pub mod pool;
pub mod index;
pub mod quarantine;
pub mod fs;
pub mod agents;
pub mod fuse;
pub mod control;
pub mod logging;
pub mod worker;
