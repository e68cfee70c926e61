//! The comparison of the world with the model.

use super::*;

pub(crate) type Verdict = Result<(), TestCaseError>;

pub(crate) fn agree<T: PartialEq + std::fmt::Debug>(what: &str, real: &T, model: &T) -> Verdict {
    if real == model {
        return Ok(());
    }
    let short = |value: &T| {
        let text = format!("{value:?}");
        if text.len() > 300 { format!("{} ...", &text[..300]) } else { text }
    };
    Err(TestCaseError::fail(format!(
        "{what}: it is {}, and the model says {}",
        short(real),
        short(model)
    )))
}

impl World<'_> {
    /// Compares all that programs see of every file and of the pool.
    pub(crate) fn compare(&self, model: &Model, around: Option<u64>) -> Verdict {
        self.compare_pool(model)?;
        for (slot, id) in model.slots.iter().enumerate() {
            if let (Some(file), Some(id)) = (&self.slots[slot], id) {
                compare_file(file, &model.files[id], around)?;
            }
        }
        for (name, id) in model.names.iter().enumerate() {
            match (self.open(name, OFlags::empty()), id) {
                (Ok(file), Some(id)) => compare_file(&file, &model.files[id], around)?,
                (found, id) => {
                    agree("an open", &found.err(), &id.is_none().then_some(Errno::NOENT))?
                }
            }
        }
        Ok(())
    }

    /// Waits for the pages of removed files: the kernel forgets a file at a moment of its own.
    pub(crate) fn compare_pool(&self, model: &Model) -> Verdict {
        let wanted = [model.free(), model.used(), model.quarantined()];
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let counters = self.pool.counters();
            let found = ["pages_free", "pages_used", "quarantined_soft"].map(|name| counters[name]);
            if found == wanted || Instant::now() > deadline {
                return agree("pages_free, pages_used, quarantined_soft", &found, &wanted);
            }
            std::thread::yield_now();
        }
    }
}

pub(crate) fn compare_file(file: &File, model: &Contents, around: Option<u64>) -> Verdict {
    let stat = rustix::fs::fstat(file).expect("an open file");
    agree("st_size", &(stat.st_size as u64), &model.size())?;
    agree("st_blocks", &(stat.st_blocks as u64), &model.blocks())?;
    agree("st_nlink", &(stat.st_nlink as u64), &model.names)?;
    compare_poison(file, model)?;
    let Some(around) = around else { return Ok(()) };
    let from = around.saturating_sub(SUBPAGE);
    agree("read around", &read(file, from, 3 * SUBPAGE), &model.read(from, 3 * SUBPAGE))
}

/// The value of an attribute; empty if there is none.
pub(crate) fn value(file: impl AsFd, name: &str) -> String {
    let mut value = vec![0; 64 << 10];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => String::from_utf8_lossy(&value[..length]).into_owned(),
        Err(Errno::NODATA) => String::new(),
        Err(errno) => panic!("{name}: {errno}"),
    }
}

/// The range at the start of an attribute's line, and the word behind it.
pub(crate) fn extent(line: &str) -> (Range, String) {
    let mut words = line.split_ascii_whitespace();
    let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (start, length) = (number().expect("an offset"), number().expect("a length"));
    (Range::at(start, length), words.next().expect("a word").to_owned())
}

pub(crate) fn compare_poison(file: &File, model: &Contents) -> Verdict {
    let text = value(file, POISON);
    let found: Vec<u64> = text.lines().flat_map(|line| subpages(extent(line).0)).collect();
    agree("poison", &found, &model.holes.keys().copied().collect())?;
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::flistxattr(file, &mut names[..]).expect("an open file");
    let listed = names[..length].split(|byte| *byte == 0).any(|name| name == POISON.as_bytes());
    agree("poison is listed", &listed, &!model.holes.is_empty())
}

/// Compares every byte, every hole and every part of the map.
pub(crate) fn compare_whole(file: &File, model: &Contents) -> Verdict {
    compare_file(file, model, None)?;
    let mut at = 0;
    while at <= model.size() {
        const PIECE: u64 = 1 << 20;
        let found = read(file, at, PIECE);
        let wanted = model.read(at, PIECE);
        if found != wanted {
            let differs = found
                .iter()
                .flatten()
                .zip(wanted.iter().flatten())
                .position(|(one, other)| one != other);
            agree(&format!("read at {at:#x}, which differs at {differs:?}"), &found, &wanted)?;
        }
        at = match found {
            Ok(bytes) if bytes.is_empty() => break,
            Ok(bytes) => at + bytes.len() as u64,
            Err(_) => (at / SUBPAGE + 1) * SUBPAGE,
        };
    }
    compare_seeks(file, model)?;
    compare_map(file, model)
}

pub(crate) fn compare_seeks(file: &File, model: &Contents) -> Verdict {
    let mut at = 0;
    for data in [true, false].into_iter().cycle() {
        let found = seek(file, at, data);
        agree(&format!("seek from {at:#x}, data {data}"), &found, &model.seek(at, data))?;
        match found {
            Ok(next) => at = next,
            Err(_) => break,
        }
    }
    Ok(())
}

pub(crate) fn compare_map(file: &File, model: &Contents) -> Verdict {
    let mut end = 0;
    for (range, state) in value(file, MAP).lines().map(extent) {
        agree("the map has no gaps", &range.start, &end)?;
        end = range.end;
        let wanted = |subpage: u64| match model.is_released(subpage * SUBPAGE) {
            true => "released",
            false if model.holes.contains_key(&subpage) => "poisoned",
            false => "memory",
        };
        let is_memory = state == "huge" || state == "small" || (model.keeps && state == "punched");
        let found = if is_memory { "memory" } else { &state };
        for subpage in subpages(range) {
            agree(&format!("the map at {:#x}", subpage * SUBPAGE), &found, &wanted(subpage))?;
        }
    }
    agree("the map's end", &end, &model.size().next_multiple_of(SUBPAGE))
}
