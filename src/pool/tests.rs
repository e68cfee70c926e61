//! Random changes of files on a pool with two nodes' parts, on real superblocks. The machine needs
//! no second node: the account goes by the homes of pages, and the kernel gives memory of the node
//! that it has.

use super::*;
use crate::placement::Order;
use proptest::prelude::*;

const SIZE: PageSize = PageSize::Huge;
const NODES: [NumaNode; 2] = [NumaNode(0), NumaNode(1)];
/// Pages of each part.
const PART: u64 = 6;
const FILES: usize = 2;

/// Makes the accounts anew for a pool that has one file, which was just opened.
pub fn adopt_one(pool: &Pool, holding: &mut Holding) {
    adopt_all(pool, std::slice::from_mut(holding));
}

fn adopt_all(pool: &Pool, files: &mut [Holding]) {
    pool.forget_account();
    let mut adoption = pool.begin_adoption();
    for holding in files {
        holding.find_homes(|pages| adoption.homes_for(pages));
        adoption.add(&holding.held());
    }
    pool.adopt(adoption).unwrap();
}

/// A pool with a part of six pages on each of two nodes.
pub fn pool_of_two_nodes() -> Pool {
    let reserves = NODES.map(|node| {
        let sealed = Sealed::create(Reach::Private, None).expect("root makes superblocks");
        let reserve = Reserve::new(node, sealed);
        reserve
            .grow(bytes_of(PART, SIZE), Source::Anywhere, |_| Ok(()))
            .expect("root takes 16 MiB");
        reserve
    });
    let account = Account::of_free_pages(PART, SIZE.bytes());
    Pool::on(SIZE, reserves.into(), NODES.map(|node| (node, account)).into())
}

#[derive(Clone, Debug)]
enum Operation {
    /// ftruncate(2) to this number of pages.
    Resize(u64),
    /// fallocate(2) of these pages, with or without FALLOC_FL_KEEP_SIZE.
    Allocate { first: u64, count: u64, keep_size: bool },
    /// fallocate(2) with FALLOC_FL_PUNCH_HOLE.
    Release { first: u64, count: u64 },
    /// All pages are to lie on this node.
    Relocate(usize),
    /// The worker dies, and the next one opens all files.
    Die,
}

fn operations() -> impl Strategy<Value = Vec<(usize, Operation, Option<u64>)>> {
    let operation = prop_oneof![
        3 => (0..8u64).prop_map(Operation::Resize),
        3 => (0..8u64, 1..6u64, any::<bool>())
            .prop_map(|(first, count, keep_size)| Operation::Allocate { first, count, keep_size }),
        2 => (0..8u64, 1..6u64).prop_map(|(first, count)| Operation::Release { first, count }),
        2 => (0..NODES.len()).prop_map(Operation::Relocate),
        1 => Just(Operation::Die),
    ];
    // The change is given up after this number of pieces.
    let given_up = prop_oneof![3 => Just(None), 1 => (0..3u64).prop_map(Some)];
    prop::collection::vec((0..FILES, operation, given_up), 1..12)
}

fn wish(node: NumaNode) -> Resolved {
    Resolved { order: Order::Prefer(vec![node]), ..Resolved::default() }
}

fn begin<'pool>(
    pool: &'pool Pool,
    file: &mut Holding,
    operation: &Operation,
) -> Result<Change<'pool>> {
    let pages = |first: u64, count: u64| SIZE.bytes_of(&(Page(first)..Page(first + count)));
    match *operation {
        Operation::Resize(pages) if pages * SIZE.bytes() <= file.size() => {
            file.begin_shrinking(pool, pages * SIZE.bytes())
        }
        Operation::Resize(pages) => {
            let now = Range::new(file.size(), file.size());
            file.begin_growth(pool, now, pages * SIZE.bytes(), &Resolved::default())
        }
        Operation::Allocate { first, count, keep_size: true } => {
            file.begin_allocation(pool, pages(first, count), &Resolved::default())
        }
        Operation::Allocate { first, count, keep_size: false } => file.begin_growth(
            pool,
            pages(first, count),
            pages(first, count).end,
            &Resolved::default(),
        ),
        Operation::Release { first, count } => file.begin_release(pool, pages(first, count)),
        Operation::Relocate(node) => file.begin_relocation(pool, EVERY_PAGE, &wish(NODES[node])),
        Operation::Die => unreachable!("no change of a file"),
    }
}

/// Carries the change out, or gives it up after `given_up` pieces. The accounts hold between any
/// two pieces.
fn carry_out(
    pool: &Pool,
    files: &mut [Holding],
    at: usize,
    mut change: Change<'_>,
    given_up: Option<u64>,
) {
    for piece in 0.. {
        if given_up == Some(piece) {
            change.give_up(Error::Interrupted);
        }
        let progress = change.advance(&mut files[at]);
        assert_sound(pool, files);
        match progress {
            Ok(Progress::More) => {}
            Ok(Progress::Done) => return,
            Err(error) => return assert!(matches!(error, Error::Interrupted), "{error}"),
        }
    }
}

/// Asserts that all accounts hold for a pool with these files.
pub fn assert_sound(pool: &Pool, files: &[Holding]) {
    let held: Held = files.iter().map(Holding::held).sum();
    assert_eq!(pool.check(&held), Vec::<String>::new());
    files.iter().for_each(|file| assert_eq!(file.check().unwrap(), Vec::<String>::new()));
}

fn open_again(pool: &Pool, files: Vec<Holding>) -> Vec<Holding> {
    let mounts: Vec<_> = files.iter().map(|file| file.sealed().mount().unwrap()).collect();
    drop(files);
    let open = |mount| {
        let sealed = Sealed::open(Reach::Programs, mount).unwrap();
        Holding::open(SIZE, sealed, &pool.nodes()).unwrap()
    };
    let mut files: Vec<_> = mounts.into_iter().map(open).collect();
    adopt_all(pool, &mut files);
    for file in &mut files {
        let settling = file.begin_settling(pool);
        file.complete(settling).unwrap();
    }
    files
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_parts_of_two_nodes_add_up_after_each_piece(operations in operations()) {
        let pool = pool_of_two_nodes();
        let mut files: Vec<_> = (0..FILES).map(|_| Holding::create(SIZE).unwrap()).collect();
        for (at, operation, given_up) in operations {
            if matches!(operation, Operation::Die) {
                files = open_again(&pool, files);
            } else if let Ok(change) = begin(&pool, &mut files[at], &operation) {
                carry_out(&pool, &mut files, at, change, given_up);
            }
            assert_sound(&pool, &files);
            prop_assert_eq!(pool.balance().total, 2 * PART, "no page is lost, and none is made");
            prop_assert_eq!(pool.balance().short, 0);
        }
    }
}

/// A pool, and a file of eight pages.
fn pool_with_eight_pages_in_use() -> (Pool, Vec<Holding>) {
    let (pool, mut file) = (pool_of_two_nodes(), Holding::create(SIZE).unwrap());
    let growth = begin(&pool, &mut file, &Operation::Resize(8)).unwrap();
    file.complete(growth).unwrap();
    (pool, vec![file])
}

#[test]
fn a_file_has_pages_of_both_nodes() {
    let (pool, files) = pool_with_eight_pages_in_use();
    let held = files[0].held();
    assert_eq!(NODES.map(|node| held.pages.of(node)), [4, 4], "of each as many");
    // All memory of this machine is of node 0, so its part is larger after a death.
    let files = open_again(&pool, files);
    assert_eq!(NODES.map(|node| files[0].held().pages.of(node)), [8, 0]);
    let totals = pool.balances();
    assert_eq!(NODES.map(|node| totals.of(node).total), [PART + 4, PART - 4]);
    assert_sound(&pool, &files);
}

/// This machine has memory of node 0 only, so pages can move there, and cannot leave.
#[test]
fn pages_move_to_the_node_that_is_wished_for_them() {
    let (pool, mut files) = pool_with_eight_pages_in_use();
    let relocation = begin(&pool, &mut files[0], &Operation::Relocate(0)).unwrap();
    carry_out(&pool, &mut files, 0, relocation, None);
    let pages = |files: &[Holding]| NODES.map(|node| files[0].held().pages.of(node));
    assert_eq!(pages(&files), [PART, 8 - PART], "as many as the node has");
    let strict = Resolved { strict: true, ..wish(NODES[0]) };
    let refused = files[0].refuse_relocation(&pool, EVERY_PAGE, &strict);
    assert!(matches!(refused, Err(Error::NodeFull(_))), "{refused:?}");
    let relocation = begin(&pool, &mut files[0], &Operation::Relocate(1)).unwrap();
    carry_out(&pool, &mut files, 0, relocation, None);
    assert_eq!(pages(&files), [PART, 8 - PART], "what the kernel does not move stays");
    assert_sound(&pool, &files);
}

#[test]
fn a_gigantic_page_moves_whole_or_comes_back() {
    const GIB: u64 = PageSize::Gigantic.bytes();
    let size = PageSize::Gigantic;
    let reserves = NODES.map(|node| {
        let reserve = Reserve::new(node, Sealed::create(Reach::Private, None).unwrap());
        reserve.grow(bytes_of(1, size), Source::Anywhere, |_| Ok(())).expect("root takes 2 GiB");
        reserve
    });
    let account = Account::of_free_pages(1, size.bytes());
    let pool = Pool::on(size, reserves.into(), NODES.map(|node| (node, account)).into());
    let mut files = vec![Holding::create(size).unwrap()];
    let growth = files[0].begin_growth(&pool, Range::new(0, 0), GIB - 5000, &wish(NODES[1]));
    files[0].complete(growth.unwrap()).unwrap();
    assert_eq!(files[0].held().pages, PerNode::on(NODES[1], 1));
    let mut relocation = files[0].begin_relocation(&pool, EVERY_PAGE, &wish(NODES[0])).unwrap();
    for _ in 0..4 {
        assert_eq!(relocation.advance(&mut files[0]).unwrap(), Progress::More);
        assert_sound(&pool, &files);
    }
    assert!(files[0].held().bytes.of(NODES[0]) > 0, "a part has moved");
    files[0].stop_for_tests(relocation);
    assert_sound(&pool, &files);
    // The next change settles the holding first: the part comes back.
    let relocation = files[0].begin_relocation(&pool, EVERY_PAGE, &wish(NODES[1])).unwrap();
    assert_eq!(files[0].held().bytes, PerNode::on(NODES[1], GIB));
    carry_out(&pool, &mut files, 0, relocation, None);
    let relocation = files[0].begin_relocation(&pool, EVERY_PAGE, &wish(NODES[0])).unwrap();
    carry_out(&pool, &mut files, 0, relocation, None);
    assert_eq!(files[0].held().pages, PerNode::on(NODES[0], 1));
    assert_eq!(files[0].held().bytes, PerNode::on(NODES[0], GIB));
    assert_sound(&pool, &files);
}
