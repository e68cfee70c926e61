//! The cost to take a pool from the machine and to give it back, and the effect of a large pool on
//! a growth.

use super::sides::{GIB, Kind, Side};
use super::table::Samples;
use super::{Plan, Table, microseconds, milliseconds};

/// Measures the rows of this module.
pub fn measure(plan: &Plan, table: &mut Table) {
    mount_and_unmount(plan, 2, table);
    if !plan.short {
        let (gib, why) = size(plan);
        if let Some(why) = why {
            table.skip("mount and umount of 16 GiB", &format!("{why}; of {gib} GiB instead"));
        }
        mount_and_unmount(plan, gib, table);
    }
    growing_by_a_page(plan, table);
}

/// Returns the largest size in GiB that the machine can give. If that is less than 16, also returns
/// the reason.
fn size(plan: &Plan) -> (u64, Option<String>) {
    let mut why = None;
    for gib in [16, 8] {
        match plan.afford_beside(gib * GIB, (gib + 2) * GIB) {
            Ok(()) => return (gib, why),
            Err(reason) => why = why.or(Some(reason)),
        }
    }
    (4, why)
}

/// For ours, an unmount ends when umount(2) has returned and the daemon has ended. For hugetlbfs,
/// both times include the write to nr_hugepages.
fn mount_and_unmount(plan: &Plan, gib: u64, table: &mut Table) {
    let mut kinds: Vec<(Kind, Vec<f64>, Vec<f64>)> =
        [Kind::Ours, Kind::Gigantic, Kind::Huge].map(|kind| (kind, Vec::new(), Vec::new())).into();
    let rounds = plan.at_most(5);
    for round in 0..=rounds {
        kinds.retain_mut(|(kind, mounts, unmounts)| match once(plan, *kind, gib * GIB) {
            Ok((mount, unmount)) => {
                mounts.extend((round > 0).then_some(mount));
                unmounts.extend((round > 0).then_some(unmount));
                true
            }
            Err(why) => {
                table.skip(&format!("mount of {gib} GiB, {}", kind.name()), &why);
                false
            }
        });
    }
    let named =
        |kind: &Kind, samples: &Vec<f64>| -> Samples { (kind.name().to_owned(), samples.clone()) };
    let mounts = kinds.iter().map(|(kind, mounts, _)| named(kind, mounts)).collect();
    table.compare(&format!("mount with {gib} GiB, {rounds} rounds"), "ms", mounts);
    let unmounts = kinds.iter().map(|(kind, _, unmounts)| named(kind, unmounts)).collect();
    table.compare(&format!("umount with {gib} GiB, until the memory is free"), "ms", unmounts);
}

fn once(plan: &Plan, kind: Kind, bytes: u64) -> Result<(f64, f64), String> {
    let mut side = Err(String::new());
    let mount = milliseconds(|| side = kind.mount(plan, bytes));
    let side = side?;
    Ok((mount, milliseconds(|| drop(side))))
}

/// Measures one pool at a time.
fn growing_by_a_page(plan: &Plan, table: &mut Table) {
    let sizes: &[u64] = if plan.short { &[1, 2] } else { &[1, 8, 16] };
    let mut pools: Vec<(u64, Samples)> =
        sizes.iter().map(|gib| (*gib, (format!("in a pool of {gib} GiB"), Vec::new()))).collect();
    for _ in 0..plan.at_most(5) {
        pools.retain_mut(|(gib, (name, samples))| {
            let affordable = plan.afford_beside(*gib * GIB, (*gib + 2) * GIB);
            match affordable.and_then(|()| Side::ours(plan, *gib * GIB, "pagesize=2M")) {
                Ok(side) => samples.push(grow(&side)),
                Err(why) => {
                    table.skip(&format!("growing a file by a page {name}"), &why);
                    return false;
                }
            }
            true
        });
    }
    let samples = pools.into_iter().map(|(_, samples)| samples).collect();
    table.growth("growing a file by one page of 2 MiB", "us", samples);
}

/// Returns the median over some pages: on a virtual machine, the host may first have to find the
/// memory for a page.
fn grow(side: &Side) -> f64 {
    const PAGE: u64 = 2 << 20;
    const PAGES: u64 = 128;
    let file = side.file("growing");
    // Makes the object. The host finds much of the memory now.
    file.set_len((1 + PAGES) * PAGE).expect("ftruncate");
    file.set_len(PAGE).expect("ftruncate");
    let page = |pages: u64| microseconds(|| file.set_len(pages * PAGE).expect("ftruncate"));
    let mut times: Vec<f64> = (2..2 + PAGES).map(page).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
