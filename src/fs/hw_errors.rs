//! Memory errors: the daemon looks for them when the kernel's count has changed, or when a program
//! meets one.

use super::{Fs, Object, Pace, RequestContext};
use crate::error::{Error, Result};
use crate::sys::memory_failures;
use std::sync::{Arc, Mutex};

/// The names under which the index keeps the kernel's counts of memory errors that have been seen.
pub(super) const FAILURES: &str = "failures";

pub(super) const FAILURES_IN_POOL: &str = "failures in pool";

impl Fs {
    /// Looks for memory errors in a file, if the kernel has met errors for which the patrol has not
    /// looked yet. Returns the number of new errors.
    ///
    /// # Errors
    /// [`Error::TakesLong`]; the errors of mmap(2) and setxattr(2).
    pub fn look_for_hw_errors_in(&self, object: &Object, pace: &Pace) -> Result<usize> {
        if memory_failures() == *self.failures.lock().expect("no panic while a number is compared")
        {
            return Ok(0);
        }
        pace.refuse_if(|| Ok(true))?;
        object.look_for_hw_errors(pace)
    }

    /// Looks for memory errors in all files, if the kernel has met any since the last time.
    pub fn look_for_hw_errors(&self) {
        self.if_memory_failed(&self.failures, FAILURES, || {
            self.recall_ready(); // an error behind the end of a file shows itself to nobody
            let look = |object: &Arc<Object>| {
                let looked = object.look_for_hw_errors(&Pace::steady()).map(drop);
                looked.inspect_err(|error| {
                    log::error!("file {}: looking for memory errors: {error}", object.node())
                })
            };
            // An error in one file does not stop the look at the others.
            self.all_objects().iter().map(look).fold(Ok(()), Result::and)
        });
    }

    /// Looks for memory errors in free memory. This takes longer, because free memory may never
    /// have been touched.
    pub fn look_for_hw_errors_in_free_memory(&self) {
        self.if_memory_failed(&self.failures_in_pool, FAILURES_IN_POOL, || {
            let replaced = self.pool.replace_bad();
            match &replaced {
                Ok(0) => {}
                Ok(count) => {
                    log::error!("memory error, {count} free subpages of the pool replaced")
                }
                Err(error) => log::error!("looking for memory errors in free memory: {error}"),
            }
            replaced.map(drop)
        });
    }

    /// Runs `look` if the kernel has met memory errors since `look` last succeeded, in this worker
    /// or in an earlier one.
    fn if_memory_failed(
        &self,
        seen: &Mutex<Option<u64>>,
        kept: &str,
        look: impl FnOnce() -> Result<()>,
    ) {
        let seen = || seen.lock().expect("no panic while a number is compared");
        // An error that the kernel meets from here on counts as unseen, even if `look` finds it.
        let now = memory_failures();
        if now == *seen() {
            return;
        }
        let looked = if look().is_ok() { now } else { None }; // `None`: look again
        *seen() = looked;
        if let Err(error) = self.index.keep(kept, looked) {
            log::warn!("the next worker will not know which memory errors were seen: {error}");
        }
    }

    /// Runs `access`, a read or a change. If it meets a memory error that was not known, notes the
    /// error and runs `access` once more: now `access` may go on around the error. Keeps the reason
    /// for which a strict placement refuses a growth.
    pub(super) fn heeding_hw_errors<T>(
        &self,
        object: &Object,
        request: RequestContext,
        mut access: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let pace = Pace::of(request);
        let mut access = || self.heeding_doors(object, &pace, &mut access);
        let result = match access() {
            Err(Error::Quarantined) => {
                self.look_for_hw_errors_in(object, &Pace::of(request))?;
                access()
            }
            result => result,
        };
        if let Err(why @ Error::NodeFull(_)) = &result {
            self.refusals.note(object.node(), request.thread, Some(why.to_string()));
        }
        result
    }
}
