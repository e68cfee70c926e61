//! The world: the same operations on a real mount.

use super::*;

/// A descriptor, opened for one operation or held for longer.
pub(crate) enum Reached<'a> {
    Opened(File),
    Held(&'a File),
}

impl Reached<'_> {
    pub(crate) fn file(&self) -> &File {
        match self {
            Self::Opened(file) => file,
            Self::Held(file) => file,
        }
    }
}

/// The real filesystem, and two processes that use it.
pub(crate) struct World<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) toucher: &'a mut Toucher,
    pub(crate) slots: [Option<File>; SLOTS],
    pub(crate) mapping: Option<Mapping>,
    pub(crate) toucher_maps: bool,
}

impl<'a> World<'a> {
    pub(crate) fn new(pool: &'a Pool, toucher: &'a mut Toucher) -> Self {
        Self { pool, toucher, slots: [None, None], mapping: None, toucher_maps: false }
    }

    pub(crate) fn path(&self, name: usize) -> PathBuf {
        self.pool.join(format!("f{name}"))
    }

    pub(crate) fn open(&self, name: usize, flags: OFlags) -> Outcome<File> {
        Ok(rustix::fs::open(self.path(name), flags | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR)?
            .into())
    }

    pub(crate) fn reach(&self, via: Via, flags: OFlags) -> Outcome<Reached<'_>> {
        match via {
            Via::Here(name) | Via::There(name) => self.open(name, flags).map(Reached::Opened),
            Via::Held(slot) => self.slots[slot].as_ref().map(Reached::Held).ok_or(Errno::BADF),
        }
    }

    /// Asks the other process, if that is the one to act.
    pub(crate) fn ask(
        &mut self,
        via: Via,
        line: impl FnOnce(std::path::Display<'_>) -> String,
    ) -> ControlFlow<Answer> {
        let Via::There(name) = via else { return ControlFlow::Continue(()) };
        let path = self.path(name);
        let answer = self.toucher.ask(&line(path.display()));
        ControlFlow::Break(understood(&answer))
    }

    pub(crate) fn do_op(&mut self, op: &Op) -> Answer {
        match self.do_there(op) {
            ControlFlow::Break(answer) => answer,
            ControlFlow::Continue(()) => self.do_here(op),
        }
    }

    pub(crate) fn do_there(&mut self, op: &Op) -> ControlFlow<Answer> {
        match *op {
            Op::Write { via, offset, length, byte } => {
                self.ask(via, |path| format!("pwrite {path} {offset} {length} {byte}"))
            }
            Op::Append { via, length, byte } => {
                self.ask(via, |path| format!("append {path} {length} {byte}"))
            }
            Op::Read { via, offset, length } => {
                self.ask(via, |path| format!("pread {path} {offset} {length}"))
            }
            Op::Truncate { via, size } => self.ask(via, |path| format!("truncate {path} {size}")),
            Op::Fallocate { via, what, offset, length } => {
                let mode = mode_of(what).bits();
                self.ask(via, |path| format!("fallocate {path} {mode} {offset} {length}"))
            }
            Op::Map { mapping: 1, name } => {
                let answer = self
                    .toucher
                    .ask(&format!("map {} 0 {MAPPED} shared rw", self.path(name).display()));
                self.toucher_maps |= answer == "ok";
                ControlFlow::Break(if answer.contains("(os error 2)") {
                    Answer::Failed(Errno::NOENT)
                } else {
                    understood(&answer)
                })
            }
            Op::Unmap { mapping: 1 } if self.toucher_maps => {
                self.toucher_maps = false;
                ControlFlow::Break(understood(&self.toucher.ask("unmap")))
            }
            Op::Load { mapping: 1, offset } if self.toucher_maps => {
                ControlFlow::Break(understood(&self.toucher.ask(&format!("load {offset}"))))
            }
            Op::Store { mapping: 1, offset, byte } if self.toucher_maps => {
                ControlFlow::Break(understood(&self.toucher.ask(&format!("store {offset} {byte}"))))
            }
            Op::Unmap { mapping: 1 }
            | Op::Load { mapping: 1, .. }
            | Op::Store { mapping: 1, .. } => ControlFlow::Break(Answer::Failed(Errno::BADF)),
            _ => ControlFlow::Continue(()),
        }
    }

    pub(crate) fn do_here(&mut self, op: &Op) -> Answer {
        let done = |outcome| answer(outcome, |()| Answer::Done);
        match *op {
            Op::Create(name) => done(self.open(name, OFlags::CREATE | OFlags::EXCL).map(drop)),
            Op::Open { slot, name } => {
                done(self.open(name, OFlags::empty()).map(|file| self.slots[slot] = Some(file)))
            }
            Op::Close { slot } => done(self.slots[slot].take().map(drop).ok_or(Errno::BADF)),
            Op::Write { via, offset, length, byte } => {
                let bytes = vec![byte; length as usize];
                let written = self.with(via, |file| rustix::io::pwrite(file, &bytes, offset));
                answer(written, |count| Answer::Count(count as u64))
            }
            Op::Append { via, length, byte } => {
                answer(self.append(via, length, byte), Answer::Count)
            }
            Op::Read { via, offset, length } => {
                answer(self.with(via, |file| read(file, offset, length)), Answer::Bytes)
            }
            Op::Truncate { via, size } => {
                done(self.with(via, |file| rustix::fs::ftruncate(file, size)))
            }
            Op::Fallocate { via, what, offset, length } => done(
                self.with(via, |file| rustix::fs::fallocate(file, mode_of(what), offset, length)),
            ),
            Op::Seek { via, offset, data } => {
                answer(self.with(via, |file| seek(file, offset, data)), Answer::Count)
            }
            Op::Poison { via, offset, length } => {
                done(self.poison(via, &format!("{offset} {length}")))
            }
            Op::Repair { via, verb, range } => {
                let verb = match verb {
                    Verb::Zero => "zero",
                    Verb::Salvage => "salvage",
                };
                done(self.set(via, REPAIR, &format!("{verb} {}", target(range))))
            }
            Op::Collapse { via, range } => done(match self.set(via, COLLAPSE, &target(range)) {
                // The kernel may be unable to at the moment. Nothing depends on it.
                Err(Errno::BUSY) => Ok(()),
                outcome => outcome,
            }),
            Op::Map { name, .. } => done(self.open(name, OFlags::empty()).map(|file| {
                let range = Range::new(0, MAPPED);
                self.mapping = Some(
                    Mapping::new(&file, range, Sharing::Shared, true).expect("it can be mapped"),
                );
            })),
            Op::Unmap { .. } => done(self.mapping.take().map(drop).ok_or(Errno::BADF)),
            Op::Load { offset, .. } => {
                match self.mapping.as_ref().map(|mapping| mapping.load(offset)) {
                    None => Answer::Failed(Errno::BADF),
                    Some(Ok(byte)) => Answer::Bytes(vec![byte]),
                    Some(Err(_)) => Answer::Fault,
                }
            }
            Op::Store { offset, byte, .. } => {
                match self.mapping.as_ref().map(|mapping| mapping.store(offset, byte)) {
                    None => Answer::Failed(Errno::BADF),
                    Some(Ok(())) => Answer::Done,
                    Some(Err(_)) => Answer::Fault,
                }
            }
            Op::Unlink(name) => done(rustix::fs::unlink(self.path(name))),
            Op::Link { from, to } => {
                done(rustix::fs::linkat(CWD, self.path(from), CWD, self.path(to), AtFlags::empty()))
            }
            Op::Rename { from, to } => done(self.rename(from, to, RenameFlags::empty())),
            Op::RenameNoReplace { from, to } => done(self.rename(from, to, RenameFlags::NOREPLACE)),
            Op::Exchange { from, to } => done(self.rename(from, to, RenameFlags::EXCHANGE)),
        }
    }

    pub(crate) fn with<T>(&self, via: Via, run: impl FnOnce(&File) -> Outcome<T>) -> Outcome<T> {
        self.reach(via, OFlags::empty()).and_then(|reached| run(reached.file()))
    }

    /// Sets O_APPEND for the time of the write if the descriptor is a held one.
    pub(crate) fn append(&self, via: Via, length: u64, byte: u8) -> Outcome<u64> {
        let reached = self.reach(via, OFlags::APPEND)?;
        rustix::fs::fcntl_setfl(reached.file(), OFlags::APPEND)?;
        let written = rustix::io::write(reached.file(), &vec![byte; length as usize]);
        rustix::fs::fcntl_setfl(reached.file(), OFlags::empty())?;
        written.map(|count| count as u64)
    }

    pub(crate) fn set(&self, via: Via, name: &str, value: &str) -> Outcome {
        self.with(via, |file| {
            rustix::fs::fsetxattr(file, name, value.as_bytes(), XattrFlags::empty())
        })
    }

    /// Quarantines a range. If punched memory is missing (EBUSY), fills it first: the model does
    /// not know the gaps that touches have filled.
    pub(crate) fn poison(&self, via: Via, value: &str) -> Outcome {
        match self.set(via, POISON, value) {
            Err(Errno::BUSY) => {
                self.with(via, |file| {
                    let (map, size) =
                        (crate::value(file, MAP), rustix::fs::fstat(file)?.st_size as u64);
                    assert!(map.contains(" punched -"), "{map}");
                    rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, size)
                })?;
                self.set(via, POISON, value)
            }
            outcome => outcome,
        }
    }

    pub(crate) fn rename(&self, from: usize, to: usize, flags: RenameFlags) -> Outcome {
        rustix::fs::renameat_with(CWD, self.path(from), CWD, self.path(to), flags)
    }
}

pub(crate) fn target(range: Option<(u64, u64)>) -> String {
    range.map_or_else(|| "all".to_owned(), |(offset, length)| format!("{offset:#x} {length}"))
}

pub(crate) fn mode_of(what: Fallocate) -> FallocateFlags {
    match what {
        Fallocate::Extend => FallocateFlags::empty(),
        Fallocate::KeepSize => FallocateFlags::KEEP_SIZE,
        Fallocate::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        Fallocate::Zero => FallocateFlags::ZERO_RANGE,
        Fallocate::ZeroKeepSize => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
    }
}

pub(crate) fn read(file: &File, offset: u64, length: u64) -> Outcome<Vec<u8>> {
    let mut buffer = vec![0xee; length as usize];
    let count = rustix::io::pread(file, &mut buffer[..], offset)?;
    buffer.truncate(count);
    Ok(buffer)
}

pub(crate) fn seek(file: &File, offset: u64, data: bool) -> Outcome<u64> {
    rustix::fs::seek(file, if data { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) })
}

/// Reads an answer of the toucher.
pub(crate) fn understood(line: &str) -> Answer {
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    let number = || rest.parse::<u64>().unwrap_or_else(|_| panic!("the toucher said {line:?}"));
    match word {
        "ok" => Answer::Done,
        "count" => Answer::Count(number()),
        "byte" => Answer::Bytes(vec![number() as u8]),
        "sigbus" => Answer::Fault,
        "errno" => Answer::Failed(Errno::from_raw_os_error(number() as i32)),
        "runs" => Answer::Bytes(rest.split_ascii_whitespace().flat_map(run).collect()),
        _ => panic!("the toucher said {line:?}"),
    }
}

pub(crate) fn run(text: &str) -> Vec<u8> {
    let (count, byte) = text.split_once(':').expect("count and byte");
    vec![byte.parse().expect("a byte"); count.parse().expect("a count")]
}
