//! The bytes that a program of the machine within the machine keeps in a subpage. They are made at
//! run time, so no file has them.

use hugetlb2fs::units::SUBPAGE_SIZE;

const WORD: usize = size_of::<u64>();

/// The bytes of subpage `page` of program `number`.
pub fn of(number: u64, page: u64) -> [u8; SUBPAGE_SIZE as usize] {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let first = (number << 32 | page).wrapping_mul(ODD);
    let mut bytes = [0; SUBPAGE_SIZE as usize];
    for (word, place) in (0..).zip(bytes.chunks_exact_mut(WORD)) {
        place.copy_from_slice(&first.wrapping_add(word).to_ne_bytes());
    }
    bytes
}
