//! The extended attributes that are this filesystem's interface, beside the attributes that users
//! set.

use super::object::FRAMES_GIVEN_UP;
use super::{Fs, NewValue, Object, Pace, RequestContext, in_force};
use crate::attributes::{
    Attribute, Counter, LONGEST_VALUE, OfEntry, OfFile, OfRoot, PLACEMENT, POISON, find,
    is_of_interface,
};
use crate::error::{Error, Result};
#[cfg(debug_assertions)]
use crate::faults;
use crate::index::Kind;
use crate::logging::{self, Excerpt};
use crate::options::{Nodes, Size};
use crate::pool::{EVERY_PAGE, Sizes};
use crate::sealed::STRAYS_SHUT;
#[cfg(debug_assertions)]
use crate::steps::{self, Step};
use crate::sys;
use crate::sys::identity::Member;
use crate::units::InodeId;
use rustix::process::getppid;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The two uses of getxattr(2). A caller that asks only for the length has not seen the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// The caller wants the value, and has a buffer of `room` bytes.
    Value {
        /// Bytes of the buffer. The caller does not get a longer value.
        room: usize,
    },
    /// The caller wants only the length of the value.
    Length,
}

/// Arms a death or a stop. The values:
///
/// - `<n> <step>`: the worker dies when it has done the step for the n-th time.
/// - `now`: the worker panics at this very request.
/// - `killed`: the worker dies at this very request, as by the OOM killer.
/// - `hold <step>`: threads stop at the step until `release`.
#[cfg(debug_assertions)]
fn arm(value: &[u8]) -> Result<()> {
    let text = std::str::from_utf8(value).unwrap_or_default();
    assert_ne!(text, "now", "a request that the worker dies of");
    if text == "killed" {
        steps::die()
    }
    if text == "release" {
        steps::release();
        return Ok(());
    }
    let named = |name: &str| Step::ALL.iter().find(|step| step.name() == name).copied();
    if let Some(step) = text.strip_prefix("hold ").and_then(named) {
        steps::hold(step);
        return Ok(());
    }
    let armed =
        text.split_once(' ').and_then(|(nth, name)| Some((nth.parse().ok()?, named(name)?)));
    let (nth, step) =
        armed.ok_or_else(|| Error::invalid("expected a number and the name of a step"))?;
    crate::steps::arm(step, nth);
    Ok(())
}

/// The number of times that each step was done since the last call, one step a line: `<n> <step>`.
#[cfg(debug_assertions)]
fn steps_text() -> String {
    steps::tally()
        .fold(String::new(), |text, (step, count)| text + &format!("{count} {}\n", step.name()))
}

/// `<n> ENOMEM` or the like: the n-th system call from now on that can answer that answers it. With
/// `lasting` behind it, so does each such call after the n-th.
#[cfg(debug_assertions)]
fn arm_failure(value: &[u8]) -> Result<()> {
    let text = std::str::from_utf8(value).unwrap_or_default();
    let (once, lasts) = text.strip_suffix(" lasting").map_or((text, false), |once| (once, true));
    let armed = once
        .split_once(' ')
        .and_then(|(nth, name)| Some((nth.parse().ok()?, faults::named(name)?)));
    let (nth, errno) =
        armed.ok_or_else(|| Error::invalid("expected a number and the name of an error"))?;
    faults::arm(nth, errno, lasts);
    Ok(())
}

impl Fs {
    /// getxattr(2).
    ///
    /// # Errors
    /// ENODATA; E2BIG for a value that is too long to return.
    pub fn attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        reading: Reading,
        request: RequestContext,
    ) -> Result<Vec<u8>> {
        if !is_of_interface(name.as_bytes()) {
            return self.index.attribute(node, name);
        }
        let row = find(name.as_bytes()).ok_or(Error::NoData)?;
        let text = match row.attribute {
            Attribute::Root(attribute) if node == InodeId::ROOT => {
                self.root_attribute(attribute, &Pace::of(request))?
            }
            Attribute::Entry(attribute) if self.is_entry(node)? => {
                self.entry_attribute(node, attribute, request)?
            }
            Attribute::File(attribute) if self.is_file(node)? => {
                self.file_attribute(&*self.object(node)?, attribute, reading, &Pace::of(request))?
            }
            Attribute::Root(_) | Attribute::Entry(_) | Attribute::File(_) => {
                return Err(Error::NoData);
            }
        };
        if text.len() > LONGEST_VALUE { Err(Error::TooLong) } else { Ok(text.into_bytes()) }
    }

    fn root_attribute(&self, attribute: OfRoot, pace: &Pace) -> Result<String> {
        match attribute {
            OfRoot::Pool => self.pool_text(pace),
            OfRoot::Targets => self.targets_text(pace),
            OfRoot::Options => Ok(in_force(&self.options, self.pool.nodes())),
            OfRoot::Unavailable => {
                pace.refuse_if(|| Ok(true))?;
                Ok(self.unavailable_text())
            }
            OfRoot::Size => {
                Ok(format!("{}\n", self.pool.balance().total * self.pool.page_size().bytes()))
            }
            OfRoot::Check => {
                pace.refuse_if(|| Ok(true))?;
                Ok(self.check(pace)?.iter().fold(String::new(), |text, what| text + what + "\n"))
            }
            #[cfg(debug_assertions)]
            OfRoot::Die => {
                Ok(Step::ALL.iter().fold(String::new(), |text, step| text + step.name() + "\n"))
            }
            #[cfg(debug_assertions)]
            OfRoot::Steps => Ok(steps_text()),
            #[cfg(debug_assertions)]
            OfRoot::Stopped => Ok(steps::stopped().to_string()),
            #[cfg(debug_assertions)]
            OfRoot::Fail => Ok(faults::report()),
        }
    }

    fn entry_attribute(
        &self,
        node: InodeId,
        attribute: OfEntry,
        request: RequestContext,
    ) -> Result<String> {
        match attribute {
            OfEntry::Placement => self.placement_text(node, &Pace::of(request)),
            OfEntry::Refusal => self.refusals.of(node, request.thread).ok_or(Error::NoData),
        }
    }

    fn file_attribute(
        &self,
        object: &Object,
        attribute: OfFile,
        reading: Reading,
        pace: &Pace,
    ) -> Result<String> {
        match attribute {
            OfFile::Poison => {
                self.look_for_hw_errors_in(object, pace)?;
                let room = match reading {
                    Reading::Length => None,
                    Reading::Value { room } => Some(room.min(LONGEST_VALUE)),
                };
                match object.report(room, pace)? {
                    text if text.is_empty() => Err(Error::NoData),
                    text => Ok(text),
                }
            }
            OfFile::Quarantine => {
                self.look_for_hw_errors_in(object, pace)?;
                object.report(None, pace)
            }
            OfFile::Map => {
                pace.refuse_if(|| Ok(true))?;
                self.look_for_hw_errors_in(object, pace)?;
                let mut text = String::new();
                for extent in object.map(&self.nodes, pace)? {
                    let node = extent.node.map_or("-".to_owned(), |node| node.to_string());
                    let _ = writeln!(text, "{} {} {node}", extent.range, extent.state.name());
                }
                Ok(text)
            }
            OfFile::Open if !object.summary().has_door => Err(Error::NoData),
            OfFile::Open => {
                pace.refuse_if(|| Ok(true))?;
                match self.close_door(object)? {
                    true => Err(Error::NoData),
                    false => Ok("open\n".to_owned()),
                }
            }
            OfFile::Losses | OfFile::Repair | OfFile::Collapse | OfFile::Inject => {
                Err(Error::NoData)
            }
        }
    }

    /// The counters of the pool, one a line: `<name> <value>`.
    fn pool_text(&self, pace: &Pace) -> Result<String> {
        let account = self.pool.balance();
        let objects = self.objects_of_files();
        let counts = objects.iter().map(|object| object.summary());
        let (soft, hw) =
            counts.fold((0, 0), |sum, counts| (sum.0 + counts.soft, sum.1 + counts.hw));
        let punched = objects.iter().map(|object| object.punched_bytes(pace));
        let punched = punched.sum::<Result<u64>>()?;
        let mut text = String::new();
        let mut line = |counter: Counter, value: u64| {
            let _ = writeln!(text, "{} {value}", counter.name());
        };
        line(Counter::PageSize, self.pool.page_size().bytes());
        line(Counter::PagesTotal, account.total);
        line(Counter::PagesFree, account.free_for_users());
        line(Counter::PagesReady, self.pages_ready());
        line(Counter::Clearing, u64::from(self.is_getting_ready()));
        line(Counter::PagesUsed, account.used());
        line(Counter::PagesReserved, account.promised);
        line(Counter::PagesOrphaned, self.pool.orphaned().load(Ordering::Relaxed));
        line(Counter::PagesMissing, account.missing);
        line(Counter::FloatBytes, account.float);
        line(Counter::ShortBytes, account.short);
        line(Counter::HugeBytesAtMount, self.huge_at_mount());
        for (node, account) in self.pool.balances().iter().filter(|(_, part)| part.total > 0) {
            line(Counter::PagesTotalOn { node }, account.total);
            line(Counter::PagesFreeOn { node }, account.free_for_users());
            line(Counter::PagesUsedOn { node }, account.used());
        }
        for (node, bytes) in self.pool.reserves() {
            line(Counter::ReserveBytes { node }, bytes);
        }
        line(Counter::Objects, objects.len() as u64);
        line(Counter::FilesUnavailable, self.unavailable_count() as u64);
        line(Counter::Orphans, self.index.orphan_count() as u64);
        line(Counter::PunchedBytes, punched);
        line(Counter::QuarantinedSoft, soft);
        line(Counter::QuarantinedHw, hw);
        line(Counter::FramesGivenUp, FRAMES_GIVEN_UP.load(Ordering::Relaxed));
        line(Counter::OpenedNatively, objects.iter().map(|object| object.natives() as u64).sum());
        line(Counter::MemoryOpen, self.with_doors().len() as u64);
        line(Counter::LogLinesDropped, logging::dropped());
        line(Counter::HolesShutAgain, STRAYS_SHUT.load(Ordering::Relaxed));
        line(
            Counter::DaemonPid,
            getppid().map_or(0, |supervisor| supervisor.as_raw_nonzero().get() as u64),
        );
        line(Counter::WorkerPid, u64::from(std::process::id()));
        Ok(text)
    }

    /// setxattr(2) of a value with flags, on behalf of the user `by`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a value that does not parse; EOPNOTSUPP for a name of the protocol
    /// that is unused or read-only.
    pub fn set_attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        value: NewValue<'_>,
        by: Member,
        request: RequestContext,
    ) -> Result<()> {
        if !is_of_interface(name.as_bytes()) {
            return self.set_user_attribute(node, name, value, by, request);
        }
        let result = match find(name.as_bytes()).map(|row| row.attribute) {
            Some(Attribute::File(attribute)) if self.is_file(node)? => {
                self.set_file_attribute(node, attribute, value.bytes, request)
            }
            Some(Attribute::Entry(attribute)) if self.is_entry(node)? => {
                self.set_entry_attribute(node, attribute, value, by, request)
            }
            Some(Attribute::Root(attribute)) if node == InodeId::ROOT => {
                self.set_root_attribute(attribute, value.bytes, &Pace::of(request))
            }
            Some(Attribute::File(_) | Attribute::Entry(_) | Attribute::Root(_)) | None => {
                Err(Error::Unsupported)
            }
        };
        if matches!(result, Err(Error::TakesLong)) {
            return result; // another thread carries the request out
        }
        self.refusals.note(node, request.thread, result.as_ref().err().map(Error::to_string));
        result.inspect_err(|error| {
            let (name, value) = (Excerpt(name.as_bytes()), Excerpt(value.bytes));
            log::info!(user = by.uid; "user {}: {name} {value} refused: {error}", by.uid);
        })
    }

    fn set_root_attribute(&self, attribute: OfRoot, value: &[u8], pace: &Pace) -> Result<()> {
        match attribute {
            OfRoot::Size => pace.refuse_if(|| Ok(true)).and_then(|()| self.resize(value)),
            OfRoot::Pool
            | OfRoot::Targets
            | OfRoot::Options
            | OfRoot::Check
            | OfRoot::Unavailable => Err(Error::Unsupported),
            #[cfg(debug_assertions)]
            OfRoot::Die => arm(value),
            #[cfg(debug_assertions)]
            OfRoot::Fail => arm_failure(value),
            #[cfg(debug_assertions)]
            OfRoot::Steps | OfRoot::Stopped => Err(Error::Unsupported),
        }
    }

    fn set_entry_attribute(
        &self,
        node: InodeId,
        attribute: OfEntry,
        value: NewValue<'_>,
        by: Member,
        request: RequestContext,
    ) -> Result<()> {
        match attribute {
            OfEntry::Placement => {
                let placement = self.checked_placement(value.bytes)?;
                let (name, text) = (OsStr::new(PLACEMENT), placement.to_string());
                let relocation = self.relocation(node, &placement, request)?;
                let text = NewValue { bytes: text.as_bytes(), ..value };
                self.set_user_attribute(node, name, text, by, request)?;
                match relocation {
                    Some((object, placement)) => {
                        let pace = Pace::of(request);
                        self.heeding_doors(&object, &pace, || {
                            object.relocate(EVERY_PAGE, &placement, &self.pool, &pace)
                        })
                    }
                    None => Ok(()),
                }
            }
            OfEntry::Refusal => Err(Error::Unsupported),
        }
    }

    fn set_file_attribute(
        &self,
        node: InodeId,
        attribute: OfFile,
        value: &[u8],
        request: RequestContext,
    ) -> Result<()> {
        let (object, pace) = (self.object(node)?, Pace::of(request));
        pace.refuse_if(|| Ok(true))?;
        // The caller may have just received a SIGBUS for an error that the patrol has not found
        // yet.
        self.look_for_hw_errors_in(&object, &pace)?;
        match attribute {
            OfFile::Poison => {
                self.heeding_doors(&object, &pace, || object.quarantine(value, &self.pool, &pace))
            }
            OfFile::Losses => {
                self.heeding_doors(&object, &pace, || object.import(value, &self.pool, &pace))
            }
            OfFile::Open => self.open_door(&object, value, request),
            OfFile::Repair => {
                let resumed = self.was_due(request, object.is_repairable(value)?)?;
                self.repair(&object, value, resumed, request)
            }
            OfFile::Collapse => object.collapse(value, &pace),
            OfFile::Inject => {
                let resumed = self.was_due(request, object.is_injectable(value))?;
                match object.inject(value) {
                    Err(Error::Invalid(_)) if resumed => Ok(()), // the dead worker has injected it
                    Err(Error::Unsupported) => {
                        log::warn!("nothing injected: this kernel has no CONFIG_MEMORY_FAILURE");
                        Err(Error::Unsupported)
                    }
                    result => result,
                }
            }
            OfFile::Quarantine | OfFile::Map => Err(Error::Unsupported),
        }
    }

    /// Repairs as a value of the repair attribute asks. A program may ask at once after a SIGBUS
    /// has told it of a memory error, before the patrol has found the error. So this looks for
    /// errors first.
    fn repair(
        &self,
        object: &Arc<Object>,
        value: &[u8],
        resumed: bool,
        request: RequestContext,
    ) -> Result<()> {
        self.look_for_hw_errors_in(object, &Pace::of(request))?;
        let repair =
            || self.with_context(object, request, |context| object.repair(value, resumed, context));
        let pace = Pace::of(request);
        let repair = || self.heeding_doors(object, &pace, repair);
        match repair() {
            // Programs can meet an error before the kernel counts it, so this looks once more.
            Err(Error::NoData) if object.look_for_hw_errors(&Pace::of(request))? > 0 => repair(),
            result => result,
        }
    }

    fn resize(&self, value: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(value).map_err(|_| Error::invalid("not text"))?;
        let sizes = self.sizes(text.trim_end_matches(['\0', '\n'])).map_err(Error::Invalid)?;
        match self.pool.resize(&sizes) {
            Err(_) if self.recall_ready() => self.pool.resize(&sizes)?,
            result => result?,
        }
        {
            let _as_they_are = self.pool.keep_size();
            self.placer.know(self.pool.nodes());
        }
        log::info!("the pool has {} pages now", sizes.pages());
        Ok(())
    }

    /// The sizes that a value of the size attribute asks for: one size, or one for each node.
    fn sizes(&self, text: &str) -> Result<Sizes, String> {
        let page_size = self.pool.page_size();
        if text.contains(':') {
            let parts = Nodes::parse(text)?.parts_or_none(page_size)?;
            return Ok(Sizes::Parts(parts.unwrap_or_default()));
        }
        let memory = sys::memory_total().map_err(|error| error.to_string())?;
        Ok(Sizes::Anywhere(Size::parse(text)?.pages(page_size, memory)?))
    }

    /// removexattr(2).
    ///
    /// # Errors
    /// [`Error::NotPermitted`] for an attribute of the protocol but the placement: a repair ends a
    /// quarantine, not the removal of its description.
    pub fn remove_attribute(
        &self,
        node: InodeId,
        name: &OsStr,
        request: RequestContext,
    ) -> Result<()> {
        if is_of_interface(name.as_bytes()) && name != PLACEMENT {
            Err(Error::NotPermitted)
        } else {
            self.remove_user_attribute(node, name, request)
        }
    }

    /// listxattr(2): the names, each with a NUL behind it. Only root sees names that begin with
    /// `trusted.`.
    ///
    /// # Errors
    /// The errors of listxattr(2).
    pub fn attribute_names(&self, node: InodeId, caller: u32) -> Result<Vec<u8>> {
        let names = self.index.attribute_names(node)?;
        let visible = |name: &[u8]| caller == 0 || !name.starts_with(b"trusted.");
        let mut names: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| visible(name))
            .flatten()
            .copied()
            .collect();
        if self
            .known_object(node)
            .is_some_and(|object| object.summary().soft + object.summary().hw > 0)
        {
            names.extend_from_slice(POISON.as_bytes());
            names.push(0);
        }
        Ok(names)
    }

    fn is_file(&self, node: InodeId) -> Result<bool> {
        Ok(self.index.attributes(node)?.kind == Kind::File)
    }

    fn is_entry(&self, node: InodeId) -> Result<bool> {
        Ok(matches!(self.index.attributes(node)?.kind, Kind::File | Kind::Directory))
    }
}
