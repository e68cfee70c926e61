//! Limits of the log: a token bucket for each place in the code and user. Pure.

use log::Record;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Lines that one place may log at once for one user.
pub const BURST: u32 = 50;
/// Lines a second that it may log for good.
pub const RATE: u32 = 10;

/// Buckets that are kept at most: a user's bucket that is full again says nothing.
const MOST: usize = 1024;

/// A place in the code, and the user that it logs for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    module: Option<&'static str>,
    line: Option<u32>,
    user: Option<u64>,
}

impl Key {
    /// The user is what the record has under the key `user`.
    pub fn of(record: &Record<'_>) -> Self {
        let user = record.key_values().get("user".into()).and_then(|user| user.to_u64());
        Self { module: record.module_path_static(), line: record.line(), user }
    }
}

struct Bucket {
    /// Lines that may still come, and when that was so.
    tokens: u32,
    filled: Instant,
    suppressed: u64,
    /// The first of these.
    like: String,
}

/// The answer for one line.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Admitted,
    /// It may not, and is the first of this key since [`Limits::take_suppressed`].
    FirstSuppressed,
    /// Nor may this one.
    Suppressed,
}

/// All buckets.
#[derive(Default)]
pub struct Limits {
    buckets: HashMap<Key, Bucket>,
    suppressed: bool,
}

impl Limits {
    /// Decides on `line` at the moment `now`.
    pub fn admit(&mut self, key: Key, line: &str, now: Instant) -> Admission {
        if self.buckets.len() >= MOST && !self.buckets.contains_key(&key) {
            self.make_room(now);
        }
        let full = || Bucket { tokens: BURST, filled: now, suppressed: 0, like: String::new() };
        let bucket = self.buckets.entry(key).or_insert_with(full);
        bucket.refill(now);
        if bucket.tokens > 0 {
            bucket.tokens -= 1;
            return Admission::Admitted;
        }
        bucket.suppressed += 1;
        self.suppressed = true;
        if bucket.suppressed > 1 {
            return Admission::Suppressed;
        }
        line.clone_into(&mut bucket.like);
        Admission::FirstSuppressed
    }

    /// There is something to take.
    pub fn any_suppressed(&self) -> bool {
        self.suppressed
    }

    /// The number of suppressed lines since the last call, for each key, with the first line of
    /// each.
    pub fn take_suppressed(&mut self) -> Vec<(u64, String)> {
        self.suppressed = false;
        let taken = self.buckets.values_mut().filter(|bucket| bucket.suppressed > 0);
        taken
            .map(|bucket| {
                (std::mem::take(&mut bucket.suppressed), std::mem::take(&mut bucket.like))
            })
            .collect()
    }

    /// Forgets those that are full; all, where none is, as the table must have an end.
    fn make_room(&mut self, now: Instant) {
        self.buckets.retain(|_, bucket| {
            bucket.refill(now);
            bucket.tokens < BURST || bucket.suppressed > 0
        });
        if self.buckets.len() >= MOST {
            self.buckets.clear();
        }
    }
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        const EACH: Duration = Duration::from_millis(1000 / RATE as u64);
        let more = now.saturating_duration_since(self.filled).as_millis() / EACH.as_millis();
        let more = u32::try_from(more).unwrap_or(BURST).min(BURST);
        if more > 0 {
            self.filled = if self.tokens + more >= BURST { now } else { self.filled + EACH * more };
            self.tokens = (self.tokens + more).min(BURST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(user: u64) -> Key {
        Key { module: Some("here"), line: Some(1), user: Some(user) }
    }

    /// Lines of `user` that are admitted of `count` at `now`.
    fn admitted(limits: &mut Limits, user: u64, count: u32, now: Instant) -> u32 {
        let admit = |_| u32::from(limits.admit(key(user), "a line", now) == Admission::Admitted);
        (0..count).map(admit).sum()
    }

    #[test]
    fn a_burst_is_admitted_and_then_ten_lines_a_second() {
        let (mut limits, start) = (Limits::default(), Instant::now());
        assert_eq!(admitted(&mut limits, 1, 1000, start), BURST);
        for second in 1..=5 {
            assert_eq!(admitted(&mut limits, 1, 1000, start + Duration::from_secs(second)), RATE);
        }
        assert_eq!(admitted(&mut limits, 1, 1000, start + Duration::from_secs(3600)), BURST);
    }

    #[test]
    fn one_user_takes_nothing_from_another() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        assert_eq!(admitted(&mut limits, 1, 1000, now), BURST);
        assert_eq!(admitted(&mut limits, 2, 1, now), 1);
    }

    #[test]
    fn what_is_suppressed_is_counted_and_told_once() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        admitted(&mut limits, 1, BURST, now);
        assert_eq!(limits.admit(key(1), "the first", now), Admission::FirstSuppressed);
        assert_eq!(limits.admit(key(1), "the second", now), Admission::Suppressed);
        assert!(limits.any_suppressed());
        assert_eq!(limits.take_suppressed(), [(2, "the first".to_owned())]);
        assert!(!limits.any_suppressed() && limits.take_suppressed().is_empty());
    }

    #[test]
    fn the_table_has_an_end() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        for user in 0..10 * MOST as u64 {
            admitted(&mut limits, user, 1, now);
            assert!(limits.buckets.len() <= MOST);
        }
    }
}
