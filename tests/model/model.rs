//! The model: files as plain memory, with the rules of the filesystem.

use super::*;

/// The answer of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Done,
    Count(u64),
    Bytes(Vec<u8>),
    /// SIGBUS.
    Fault,
    /// Any byte: the place is behind the end of file, in its last subpage.
    Anything,
    Failed(Errno),
}

pub(crate) type Outcome<T = ()> = Result<T, Errno>;

pub(crate) fn answer<T>(outcome: Outcome<T>, good: impl FnOnce(T) -> Answer) -> Answer {
    outcome.map_or_else(Answer::Failed, good)
}

/// The bytes that were in a quarantined subpage.
pub(crate) type Rescued = Vec<u8>;

/// A regular file: its bytes and its pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    pub(crate) bytes: Vec<u8>,
    /// The pages from the start of the file on that its size or an allocation behind the end has
    /// taken.
    pub(crate) reserved: u64,
    /// The reserved pages that were punched: the pool has them again, and they read as zeros.
    pub(crate) released: BTreeSet<u64>,
    /// Quarantined subpages.
    pub(crate) holes: BTreeMap<u64, Rescued>,
    pub(crate) names: u64,
    /// With `punch=keep`, punched pages stay the file's, and are memory to every reader.
    pub(crate) keeps: bool,
}

pub(crate) fn subpages(range: Range) -> std::ops::Range<u64> {
    let range = range.subpages();
    range.start.0..range.end.0
}

pub(crate) fn pages_up(bytes: u64) -> u64 {
    bytes.div_ceil(PAGE)
}

/// The pages that hold any byte of `range`.
pub(crate) fn touching(range: Range) -> std::ops::Range<u64> {
    if range.is_empty() { 0..0 } else { range.start / PAGE..pages_up(range.end) }
}

impl Contents {
    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// The range of the whole file.
    pub(crate) fn extent(&self) -> Range {
        Range::new(0, self.size())
    }

    /// The pages that the file owns: it takes whole pages, and punched pages are the pool's again.
    pub(crate) fn pages(&self) -> u64 {
        self.reserved - self.released.len() as u64
    }

    /// st_blocks: whole pages, as the pool counts them. A file with quarantined subpages counts its
    /// readable bytes instead. That is less than its size, so cp(1) looks for holes.
    pub(crate) fn blocks(&self) -> u64 {
        let page = |page: &u64| Range::at(page * PAGE, PAGE).intersect(self.extent()).len();
        let released: u64 = self.released.iter().map(page).sum();
        let readable = (self.size() - released).saturating_sub(self.holes.len() as u64 * SUBPAGE);
        let counted = if self.holes.is_empty() { self.pages() * PAGE } else { readable };
        counted / 512
    }

    pub(crate) fn holes_in(&self, range: Range) -> Vec<u64> {
        self.holes.range(subpages(range)).map(|(hole, _)| *hole).collect()
    }

    /// The bytes of the file in a subpage.
    pub(crate) fn bytes_of(&self, subpage: u64) -> Range {
        Range::at(subpage * SUBPAGE, SUBPAGE).intersect(self.extent())
    }

    pub(crate) fn put(&mut self, range: Range, byte: u8) {
        if !range.is_empty() {
            self.bytes[range.start as usize..range.end as usize].fill(byte);
        }
    }

    /// Returns good bytes up to the first quarantined subpage. EIO if the first byte lies in that
    /// subpage.
    pub(crate) fn read(&self, offset: u64, length: u64) -> Outcome<Vec<u8>> {
        let range = Range::at(offset, length).intersect(self.extent());
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let end = match self.holes_in(range).first() {
            Some(hole) if hole * SUBPAGE <= range.start => return Err(Errno::IO),
            Some(hole) => hole * SUBPAGE,
            None => range.end,
        };
        Ok(self.bytes[range.start as usize..end as usize].to_vec())
    }

    /// A file with soft holes cannot grow until it is repaired (EBUSY). A growth that does not fit
    /// fails with ENOSPC and changes nothing. A growth takes the punched pages in `range` and in
    /// the new part of the file again.
    pub(crate) fn grow(&mut self, range: Range, size: u64, free: u64) -> Outcome {
        let size = size.max(self.size());
        let grown = Range::new(self.size(), size);
        let inside = range.intersect(Range::new(0, size));
        let again = |page: &u64| touching(inside).contains(page) || touching(grown).contains(page);
        let missing: Vec<u64> = self.released.iter().copied().filter(again).collect();
        if missing.is_empty() && grown.is_empty() {
            return Ok(());
        }
        if !self.holes.is_empty() {
            return Err(Errno::BUSY);
        }
        let reserved = self.reserved.max(pages_up(size));
        if reserved - self.reserved + missing.len() as u64 > free {
            return Err(Errno::NOSPC);
        }
        self.reserved = reserved;
        self.released.retain(|page| !missing.contains(page));
        self.bytes.resize(size as usize, 0);
        Ok(())
    }

    /// FALLOC_FL_KEEP_SIZE: the file takes all pages up to the end of `range`. Behind the end of
    /// file, that only changes counts, so quarantined subpages do not forbid it.
    pub(crate) fn reserve(&mut self, range: Range, free: u64) -> Outcome {
        let missing: Vec<u64> =
            self.released.iter().copied().filter(|page| touching(range).contains(page)).collect();
        if missing.iter().any(|page| page * PAGE < self.size()) && !self.holes.is_empty() {
            return Err(Errno::BUSY);
        }
        let reserved = self.reserved.max(pages_up(range.end));
        if reserved - self.reserved + missing.len() as u64 > free {
            return Err(Errno::NOSPC);
        }
        self.reserved = reserved;
        self.released.retain(|page| !missing.contains(page));
        Ok(())
    }

    /// A write repairs a quarantined subpage that it covers whole (up to the end of file). A
    /// subpage that it covers in part ends the write, with EIO if the write starts there.
    pub(crate) fn write(&mut self, offset: u64, length: u64, byte: u8, free: u64) -> Outcome<u64> {
        let mut range = Range::at(offset, length);
        let obstacle =
            self.holes_in(range).into_iter().find(|hole| !range.covers(self.bytes_of(*hole)));
        match obstacle {
            Some(hole) if hole * SUBPAGE <= offset => return Err(Errno::IO),
            Some(hole) => range.end = hole * SUBPAGE,
            None => {}
        }
        self.grow(range, range.end, free)?;
        for hole in self.holes_in(range) {
            self.holes.remove(&hole);
        }
        self.put(range, byte);
        Ok(range.len())
    }

    /// truncate discards a quarantined subpage with its record. While another one stays, the file
    /// cannot give pages back (EBUSY). Pages behind the end are an exception: a truncate to the
    /// present size gives them back.
    pub(crate) fn truncate(&mut self, size: u64, free: u64) -> Outcome {
        if size > self.size() {
            return self.grow(Range::new(0, 0), size, free);
        }
        if size < self.size() {
            if !self.holes_in(Range::new(0, size)).is_empty() {
                return Err(Errno::BUSY);
            }
            self.bytes.truncate(size as usize);
            self.holes.clear();
        }
        self.reserved = self.reserved.min(pages_up(size));
        self.released.retain(|page| *page < pages_up(size));
        Ok(())
    }

    pub(crate) fn fallocate(&mut self, what: Fallocate, range: Range, free: u64) -> Outcome {
        match what {
            Fallocate::Extend => self.grow(range, range.end, free),
            Fallocate::KeepSize => self.reserve(range, free),
            Fallocate::Zero => {
                self.refuse_partial(range)?;
                self.grow(range, range.end, free)?;
                self.zero(range);
                Ok(())
            }
            Fallocate::ZeroKeepSize => {
                self.refuse_partial(range)?;
                self.reserve(range, free)?;
                self.zero(range);
                Ok(())
            }
            Fallocate::Punch => self.punch(range),
        }
    }

    /// EIO if `range` covers a quarantined subpage only in part: such a part cannot be zeroed.
    pub(crate) fn refuse_partial(&self, range: Range) -> Outcome {
        let range = range.intersect(self.extent());
        let covered = self.holes_in(range).iter().all(|hole| range.covers(self.bytes_of(*hole)));
        if covered { Ok(()) } else { Err(Errno::IO) }
    }

    /// Zeroes a range. Quarantined subpages in it are good again.
    pub(crate) fn zero(&mut self, range: Range) {
        let range = range.intersect(self.extent());
        for hole in self.holes_in(range) {
            self.holes.remove(&hole);
        }
        self.put(range, 0);
    }

    /// Gives whole pages back to the pool, unless quarantined subpages elsewhere forbid it (EBUSY).
    /// Zeroes the rest.
    pub(crate) fn punch(&mut self, range: Range) -> Outcome {
        self.refuse_partial(range)?;
        if self.keeps {
            self.zero(range);
            return Ok(());
        }
        let whole = pages_up(range.start)..range.end / PAGE;
        let owned: Vec<u64> = (0..self.reserved)
            .filter(|page| whole.contains(page) && !self.released.contains(page))
            .collect();
        let outside = |hole: &u64| !owned.contains(&(hole * SUBPAGE / PAGE));
        if !owned.is_empty() && self.holes.keys().any(outside) {
            return Err(Errno::BUSY);
        }
        self.released.extend(owned);
        self.zero(range);
        Ok(())
    }

    pub(crate) fn is_released(&self, offset: u64) -> bool {
        self.released.contains(&(offset / PAGE))
    }

    pub(crate) fn is_hole(&self, offset: u64) -> bool {
        offset >= self.size()
            || self.is_released(offset)
            || self.holes.contains_key(&(offset / SUBPAGE))
    }

    /// SEEK_HOLE and SEEK_DATA: quarantined subpages and released pages are holes, all other bytes
    /// are data.
    pub(crate) fn seek(&self, offset: u64, data: bool) -> Outcome<u64> {
        if offset >= self.size() {
            return Err(Errno::NXIO);
        }
        // Within a subpage nothing changes, so the search looks at the start of each subpage.
        let next = |at: u64| (at / SUBPAGE + 1) * SUBPAGE;
        let found = std::iter::successors(Some(offset), |at| Some(next(*at)))
            .find(|at| *at >= self.size() || self.is_hole(*at) != data)
            .expect("the file ends");
        match data {
            true if found >= self.size() => Err(Errno::NXIO),
            _ => Ok(found.min(self.size())),
        }
    }

    /// Rounds a range outward to 4 KiB. EINVAL for a range behind the end of file.
    pub(crate) fn named(&self, offset: u64, length: u64) -> Outcome<Range> {
        let range = Range::at(offset, length);
        let fits = !range.is_empty()
            && offset < self.size()
            && range.end <= self.size().next_multiple_of(SUBPAGE);
        if fits { Ok(range.subpages_out()) } else { Err(Errno::INVAL) }
    }

    pub(crate) fn named_or_all(&self, range: Option<(u64, u64)>) -> Outcome<Range> {
        range.map_or_else(|| Ok(self.extent()), |(offset, length)| self.named(offset, length))
    }

    /// Quarantines a range. EINVAL if a page of it is released: it has no memory. A quarantined
    /// subpage keeps its state.
    pub(crate) fn poison(&mut self, offset: u64, length: u64) -> Outcome {
        let range = self.named(offset, length)?;
        if subpages(range).any(|subpage| self.is_released(subpage * SUBPAGE)) {
            return Err(Errno::INVAL);
        }
        for subpage in subpages(range) {
            let bytes = self.bytes_of(subpage);
            let known = self.bytes[bytes.start as usize..bytes.end as usize].to_vec();
            self.holes.entry(subpage).or_insert(known);
        }
        Ok(())
    }

    /// `zero` gives a subpage zeroed memory; `salvage` gives it all known bytes. ENODATA if there
    /// is nothing to repair.
    pub(crate) fn repair(&mut self, verb: Verb, range: Option<(u64, u64)>) -> Outcome {
        let range = self.named_or_all(range)?;
        let holes = self.holes_in(range);
        if holes.is_empty() {
            return Err(Errno::NODATA);
        }
        for hole in holes {
            let rescued = self.holes.remove(&hole).expect("it was found");
            let range = self.bytes_of(hole);
            let place = &mut self.bytes[range.start as usize..range.end as usize];
            match verb {
                Verb::Zero => place.fill(0),
                Verb::Salvage => place.copy_from_slice(&rescued),
            }
        }
        Ok(())
    }

    /// The answer to a touch of mapped memory: SIGBUS on quarantined subpages, on released pages
    /// and behind the end.
    pub(crate) fn touch(&self, offset: u64) -> Answer {
        let end = self.size().next_multiple_of(SUBPAGE);
        if offset >= end || self.is_released(offset) || self.holes.contains_key(&(offset / SUBPAGE))
        {
            return Answer::Fault;
        }
        if offset < self.size() {
            Answer::Bytes(vec![self.bytes[offset as usize]])
        } else {
            Answer::Anything
        }
    }
}

/// All files, by an id of the model's own.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) files: BTreeMap<u64, Contents>,
    pub(crate) next: u64,
    pub(crate) names: [Option<u64>; NAMES],
    pub(crate) slots: [Option<u64>; SLOTS],
    pub(crate) mappings: [Option<u64>; MAPPINGS],
    /// Files keep their punched pages.
    pub(crate) keeps: bool,
}

impl Model {
    pub(crate) fn used(&self) -> u64 {
        self.files.values().map(Contents::pages).sum()
    }

    pub(crate) fn free(&self) -> u64 {
        PAGES - self.used()
    }

    pub(crate) fn quarantined(&self) -> u64 {
        self.files.values().map(|file| file.holes.len() as u64).sum()
    }

    pub(crate) fn named(&self, name: usize) -> Outcome<u64> {
        self.names[name].ok_or(Errno::NOENT)
    }

    /// The file of a name or of a descriptor; EBADF for a descriptor that is not open.
    pub(crate) fn reached(&self, via: Via) -> Outcome<u64> {
        match via {
            Via::Here(name) | Via::There(name) => self.named(name),
            Via::Held(slot) => self.slots[slot].ok_or(Errno::BADF),
        }
    }

    pub(crate) fn file(&mut self, via: Via) -> Outcome<&mut Contents> {
        let id = self.reached(via)?;
        Ok(self.files.get_mut(&id).expect("names lead to files"))
    }

    pub(crate) fn drop_name(&mut self, name: usize) {
        if let Some(id) = self.names[name].take() {
            self.files.get_mut(&id).expect("names lead to files").names -= 1;
        }
    }

    /// Removes unlinked files that have no descriptor and no mapping. Their memory is given back.
    pub(crate) fn bury(&mut self) {
        let held: Vec<u64> = self.slots.iter().chain(&self.mappings).flatten().copied().collect();
        self.files.retain(|id, file| file.names > 0 || held.contains(id));
    }

    pub(crate) fn create(&mut self, name: usize) -> Outcome {
        if self.names[name].is_some() {
            return Err(Errno::EXIST);
        }
        self.files
            .insert(self.next, Contents { names: 1, keeps: self.keeps, ..Contents::default() });
        self.names[name] = Some(self.next);
        self.next += 1;
        Ok(())
    }

    pub(crate) fn link(&mut self, from: usize, to: usize) -> Outcome {
        let id = self.named(from)?;
        if self.names[to].is_some() {
            return Err(Errno::EXIST);
        }
        self.names[to] = Some(id);
        self.files.get_mut(&id).expect("names lead to files").names += 1;
        Ok(())
    }

    /// rename(2): nothing happens if both names belong to one file.
    pub(crate) fn rename(&mut self, from: usize, to: usize) -> Outcome {
        let id = self.named(from)?;
        if self.names[to] != Some(id) {
            self.drop_name(to);
            self.names[to] = self.names[from].take();
        }
        Ok(())
    }

    pub(crate) fn do_op(&mut self, op: &Op) -> Answer {
        let free = self.free();
        let done = |outcome| answer(outcome, |()| Answer::Done);
        let answer = match *op {
            Op::Create(name) => done(self.create(name)),
            Op::Open { slot, name } => done(self.named(name).map(|id| self.slots[slot] = Some(id))),
            Op::Close { slot } => done(self.slots[slot].take().map(drop).ok_or(Errno::BADF)),
            Op::Write { via, offset, length, byte } => answer(
                self.file(via).and_then(|file| file.write(offset, length, byte, free)),
                Answer::Count,
            ),
            Op::Append { via, length, byte } => {
                let write = |file: &mut Contents| file.write(file.size(), length, byte, free);
                answer(self.file(via).and_then(write), Answer::Count)
            }
            Op::Read { via, offset, length } => {
                answer(self.file(via).and_then(|file| file.read(offset, length)), Answer::Bytes)
            }
            Op::Truncate { via, size } => {
                done(self.file(via).and_then(|file| file.truncate(size, free)))
            }
            Op::Fallocate { via, what, offset, length } => {
                let range = Range::at(offset, length);
                done(self.file(via).and_then(|file| file.fallocate(what, range, free)))
            }
            Op::Seek { via, offset, data } => {
                answer(self.file(via).and_then(|file| file.seek(offset, data)), Answer::Count)
            }
            Op::Poison { via, offset, length } => {
                done(self.file(via).and_then(|file| file.poison(offset, length)))
            }
            Op::Repair { via, verb, range } => {
                done(self.file(via).and_then(|file| file.repair(verb, range)))
            }
            Op::Collapse { via, range } => {
                done(self.file(via).and_then(|file| file.named_or_all(range).map(drop)))
            }
            Op::Map { mapping, name } => {
                done(self.named(name).map(|id| self.mappings[mapping] = Some(id)))
            }
            Op::Unmap { mapping } => {
                done(self.mappings[mapping].take().map(drop).ok_or(Errno::BADF))
            }
            Op::Load { mapping, offset } => match self.mappings[mapping] {
                Some(id) => self.files[&id].touch(offset),
                None => Answer::Failed(Errno::BADF),
            },
            Op::Store { mapping, offset, byte } => self.store(mapping, offset, byte),
            Op::Unlink(name) => done(self.named(name).map(|_| self.drop_name(name))),
            Op::Link { from, to } => done(self.link(from, to)),
            Op::Rename { from, to } => done(self.rename(from, to)),
            Op::RenameNoReplace { from, to } => done(match (self.named(from), self.named(to)) {
                (Err(errno), _) => Err(errno),
                (_, Ok(_)) => Err(Errno::EXIST),
                _ => self.rename(from, to),
            }),
            Op::Exchange { from, to } => {
                done(self.named(from).and(self.named(to)).map(|_| self.names.swap(from, to)))
            }
        };
        self.bury();
        answer
    }

    pub(crate) fn store(&mut self, mapping: usize, offset: u64, byte: u8) -> Answer {
        let Some(id) = self.mappings[mapping] else { return Answer::Failed(Errno::BADF) };
        let file = self.files.get_mut(&id).expect("it is mapped");
        match file.touch(offset) {
            Answer::Bytes(_) => file.put(Range::at(offset, 1), byte),
            // A store behind the end never becomes visible, so the file is unchanged.
            Answer::Anything => {}
            other => return other,
        }
        Answer::Done
    }

    /// True if the answer to a touch is certain. A 2 MiB entry maps all of the folio with the end
    /// of file, so behind the last subpage a program may get SIGBUS or not.
    pub(crate) fn is_settled(&self, mapping: usize, offset: u64) -> bool {
        let Some(id) = self.mappings[mapping] else { return true };
        let size = self.files[&id].size();
        !(size.next_multiple_of(SUBPAGE)..size.next_multiple_of(FOLIO)).contains(&offset)
    }
}
