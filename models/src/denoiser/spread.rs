//! Which device runs which branch of a step.

/// One half of a job in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Load {
    /// Work of the half, in any unit.
    pub(super) cost: f64,
    /// The device that has the half's residuals of an earlier step.
    pub(super) at: Option<usize>,
}

/// Part of the largest device's work by which a half may be placed worse to stay where its residuals
/// are.
const TIE: f64 = 0.01;

/// Chooses the device of each half, such that the device with the most work has little of it: the
/// largest piece of work first, each to the device that has the least work so far.
///
/// A piece is a whole job if there are at least as many jobs as devices, because two halves in one
/// forward pass are faster than in two; otherwise it is a half. Without `split`, it is always a job.
pub(super) fn spread(jobs: &[Vec<Load>], devices: usize, split: bool) -> Vec<Vec<usize>> {
    let mut places: Vec<Vec<usize>> = jobs.iter().map(|halves| vec![0; halves.len()]).collect();
    if devices < 2 {
        return places;
    }
    let whole = !split || jobs.len() >= devices;
    // Cost, home, job, and the half if it is not the whole job.
    let mut pieces: Vec<(f64, Option<usize>, usize, Option<usize>)> = Vec::new();
    for (job, halves) in jobs.iter().enumerate() {
        if whole {
            let cost = halves.iter().map(|half| half.cost).sum();
            let home = halves.iter().find_map(|half| half.at);
            pieces.push((cost, home, job, None));
        } else {
            let halves = halves.iter().enumerate();
            pieces.extend(halves.map(|(index, half)| (half.cost, half.at, job, Some(index))));
        }
    }
    // The sort is stable, so that equal pieces keep their order.
    pieces.sort_by(|a, b| b.0.total_cmp(&a.0));
    let slack = TIE * pieces.first().map_or(0.0, |piece| piece.0);
    let mut work = vec![0.0; devices];
    for (cost, home, job, half) in pieces {
        let least = work.iter().copied().fold(f64::INFINITY, f64::min);
        let home = home.filter(|&home| home < devices && work[home] <= least + slack);
        let first = work.iter().position(|&it| it <= least).unwrap_or(0);
        let device = home.unwrap_or(first);
        work[device] += cost;
        match half {
            Some(half) => places[job][half] = device,
            None => places[job].fill(device),
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(costs: &[f64]) -> Vec<Load> {
        let load = |&cost| Load { cost, at: None };
        costs.iter().map(load).collect()
    }

    #[test]
    fn the_halves_of_one_job_run_side_by_side() {
        assert_eq!(spread(&[job(&[1.0, 1.1])], 2, true), [[1, 0]]);
        assert_eq!(spread(&[job(&[1.0, 1.0])], 3, true), [[0, 1]]);
        assert_eq!(spread(&[job(&[1.0, 1.0])], 1, true), [[0, 0]]);
        assert_eq!(spread(&[job(&[1.0, 1.0])], 2, false), [[0, 0]]);
    }

    #[test]
    fn a_job_without_guidance_takes_one_device() {
        assert_eq!(spread(&[job(&[1.0])], 2, true), [[0]]);
        assert_eq!(spread(&[job(&[1.0]), job(&[1.0])], 2, true), [[0], [1]]);
    }

    #[test]
    fn as_many_jobs_as_devices_stay_whole() {
        let jobs = [job(&[1.0, 1.0]), job(&[4.0, 4.0]), job(&[1.0])];
        assert_eq!(spread(&jobs, 2, true), [vec![1, 1], vec![0, 0], vec![1]]);
        // Three devices: whole jobs. Four: halves.
        assert_eq!(spread(&jobs, 3, true), [vec![1, 1], vec![0, 0], vec![2]]);
        assert_eq!(spread(&jobs, 4, true), [vec![2, 3], vec![0, 1], vec![2]]);
    }

    #[test]
    fn a_half_stays_where_its_residuals_are_unless_another_device_has_less_work() {
        let at = |cost, at| Load { cost, at: Some(at) };
        assert_eq!(spread(&[vec![at(1.0, 1), at(1.0, 0)]], 2, true), [[1, 0]]);
        assert_eq!(
            spread(&[vec![at(1.0, 1)], vec![at(1.0, 0)]], 2, true),
            [[1], [0]]
        );
        // Both were on device 1: one of them moves.
        assert_eq!(spread(&[vec![at(1.0, 1), at(1.0, 1)]], 2, true), [[1, 0]]);
        // A device that does not exist any more is no home.
        assert_eq!(spread(&[vec![at(1.0, 7)]], 2, true), [[0]]);
    }
}
