//! The sizes of recent files, by directory; pure.

use crate::placement::Resolved;
use crate::units::InodeId;
use std::collections::VecDeque;

/// Directories that are remembered.
const MOST_DIRECTORIES: usize = 16;

/// Files of one directory that are remembered.
const MOST_FILES: usize = 4;

/// The memory that a file takes: a number of pages, on the nodes that the placement asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    pub pages: u64,
    pub placement: Resolved,
}

/// The memory that recent files have taken. A directory with many files does not displace the
/// others.
#[derive(Debug, Default)]
pub struct History {
    /// The latest directory first, and of each directory the latest file first.
    directories: VecDeque<(InodeId, VecDeque<Wish>)>,
}

impl History {
    pub fn is_empty(&self) -> bool {
        self.directories.is_empty()
    }

    /// A file of `directory` has got its size.
    pub fn learn(&mut self, directory: InodeId, wish: Wish) {
        let known = self.directories.iter().position(|(known, _)| *known == directory);
        let known = known.and_then(|at| self.directories.remove(at));
        let (_, mut wishes) = known.unwrap_or((directory, VecDeque::new()));
        wishes.push_front(wish);
        wishes.truncate(MOST_FILES);
        self.directories.push_front((directory, wishes));
        self.directories.truncate(MOST_DIRECTORIES);
    }

    /// The pages of the latest file of `directory`, or else of any file.
    pub fn latest(&self, directory: InodeId) -> Option<u64> {
        let own = self.directories.iter().find(|(known, _)| *known == directory);
        let (_, wishes) = own.or(self.directories.front())?;
        wishes.front().map(|wish| wish.pages)
    }

    /// The memory that the next files may take. Directories take turns, and so do the files of a
    /// directory. It has no end.
    pub fn wishes(&self) -> impl Iterator<Item = &Wish> {
        let turn = |round: usize| {
            self.directories.iter().map(move |(_, wishes)| &wishes[round % wishes.len()])
        };
        (0..).flat_map(turn).take_while(|_| !self.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(pages: u64) -> Wish {
        Wish { pages, placement: Resolved::default() }
    }

    fn history(files: &[(u64, u64)]) -> History {
        let mut history = History::default();
        files
            .iter()
            .for_each(|(directory, pages)| history.learn(InodeId(*directory), wish(*pages)));
        history
    }

    fn first(history: &History, count: usize) -> Vec<u64> {
        history.wishes().map(|wish| wish.pages).take(count).collect()
    }

    #[test]
    fn directories_take_turns() {
        let history = history(&[(1, 16), (2, 4), (2, 8), (1, 32)]);
        assert_eq!(first(&history, 6), [32, 8, 16, 4, 32, 8]);
        assert_eq!(
            [1, 2, 3].map(|directory| history.latest(InodeId(directory))),
            [Some(32), Some(8), Some(32)]
        );
    }

    #[test]
    fn many_files_of_one_directory_do_not_displace_the_others() {
        let mut history = history(&[(1, 16)]);
        (0..100).for_each(|_| history.learn(InodeId(2), wish(1)));
        assert_eq!(history.latest(InodeId(1)), Some(16));
        assert_eq!(first(&history, 4), [1, 16, 1, 16]);
    }

    #[test]
    fn no_more_is_remembered_than_the_bounds() {
        let files: Vec<_> = (0..1000).map(|n| (n % 100, n)).collect();
        let history = history(&files);
        assert_eq!(history.directories.len(), MOST_DIRECTORIES);
        assert!(history.directories.iter().all(|(_, wishes)| wishes.len() <= MOST_FILES));
        assert_eq!(history.latest(InodeId(99)), Some(999));
    }
}
