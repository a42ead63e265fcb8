//! Chooses the replica for a request: a pure function of what the cluster's nodes say of themselves, how old that is, what
//! this node has sent them since, and one random number. Equal inputs give equal answers.
//!
//! It first narrows the candidates to the best class that is not empty (ready before saturated, in time before late, at pace
//! before slow, a free seat before a queue, this zone before others), and lets the strategy choose among those. So nothing but its caps keeps a
//! usable replica from serving, however little it is preferred.

use std::time::Duration;

use super::config::Strategy;
use super::hot_prefixes::matched_tokens;
use super::retry_budget::unit;
use crate::cluster::LoadReport;
use crate::health::DegradedBy;
use crate::types::NodeState;

/// Older reports say nothing any more: the node is not used for new requests.
pub const MAX_REPORT_AGE: Duration = Duration::from_secs(15);
/// Age that halves a report's weight.
const REPORT_HALF_LIFE: Duration = Duration::from_secs(3);

/// Memory use at which the weight begins to shrink, and at which a node leaves the pool.
const MEMORY_SHRINKS: f64 = 0.8;
const MEMORY_FULL: f64 = 0.95;
/// Least share that a single trouble leaves of a weight.
const LEAST_FACTOR: f64 = 0.05;
/// What `Degraded` leaves of it.
const DEGRADED: f64 = 0.3;

/// As the readiness verdict spells that a queue is too full.
const SATURATED: &str = "saturated";
/// Tokens of the prompt, more than here, that make a peer's cache worth a hop.
const WORTH_A_HOP: usize = 512;
/// Weight of a candidate that holds the whole prompt, compared with one that holds nothing of it.
const WHOLE_PREFIX: f64 = 4.0;

/// Bounds of the answer to a request that nobody takes.
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// What placement needs to know of a request.
#[derive(Clone, Copy, Debug)]
pub struct PlacementRequest<'a> {
    /// Tokens to compute before the first new one: the prompt, and what was emitted before.
    pub prompt_tokens: u64,
    /// Choices to generate, each with a seat of its own; at least 1.
    pub choices: u32,
    /// Of the prompt's beginnings (`hot_prefixes::hashes`).
    pub prefix_hashes: &'a [u32],
    /// What is left of the deadline.
    pub remaining: Option<Duration>,
    /// Goes on with a stream that has begun: caps do not apply.
    pub is_continuation: bool,
}

/// A replica that could serve the request: this node, or a peer.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub report: &'a LoadReport,
    /// Since the report was made; zero for this node.
    pub age: Duration,
    /// It is this node itself.
    pub is_here: bool,
    /// True for this node itself, too.
    pub is_same_zone: bool,
    /// Choices and prompt tokens that this node has sent there and the report cannot know of yet.
    pub sent_choices: u32,
    pub sent_tokens: u64,
    /// From breaker and stability, 0 to 1.
    pub weight: f64,
    /// It is slow: equal work takes it so many times as long as its siblings.
    pub slowness: Option<f64>,
    /// Nothing has been heard of it for a while, though it should have been.
    pub is_silent: bool,
    /// The breaker lets a call through, and the stream has not failed there before.
    pub may_serve: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The index of the candidate.
    Serve(usize),
    /// All that could serve it are over their caps.
    Shed { retry_after: Duration },
    /// Nobody could serve it, however little there was to do.
    Nowhere,
}

/// Where the request goes. `random` is any number; it settles what is equal, and draws where the strategy draws.
pub fn place(
    strategy: Strategy,
    request: &PlacementRequest<'_>,
    candidates: &[Candidate<'_>],
    random: u64,
) -> Placement {
    let usable: Vec<Standing> = (candidates.iter().enumerate())
        .filter(|(_, candidate)| is_usable(candidate, request.is_continuation))
        .map(|(index, candidate)| Standing::new(index, candidate, request))
        .collect();
    if usable.is_empty() {
        return Placement::Nowhere;
    }
    let mut pool = usable.clone();
    pool.retain(|standing| request.is_continuation || !standing.is_full);
    if pool.is_empty() {
        return Placement::Shed { retry_after: retry_after(&usable) };
    }
    narrow(&mut pool, |standing| standing.is_known);
    narrow(&mut pool, |standing| !standing.is_silent);
    narrow(&mut pool, |standing| standing.is_ready);
    let remaining = request.remaining.map_or(f64::INFINITY, |remaining| remaining.as_secs_f64());
    narrow(&mut pool, |standing| standing.wait < remaining);
    narrow(&mut pool, |standing| standing.has_budget);
    leave_out_slow_ones(&mut pool);
    if strategy == Strategy::PrefixCache {
        narrow_to_longest_prefix(&mut pool);
    }
    narrow(&mut pool, |standing| standing.has_seats);
    if strategy == Strategy::Balanced
        && let Some(here) = here_if_well(&pool)
    {
        return Placement::Serve(here.index);
    }
    narrow(&mut pool, |standing| standing.is_same_zone);
    Placement::Serve(choose(strategy, &pool, random).index)
}

/// Whether the candidate could serve the request at all, were it idle.
fn is_usable(candidate: &Candidate<'_>, is_continuation: bool) -> bool {
    let report = candidate.report;
    let is_up = match report.state {
        NodeState::Ready | NodeState::Degraded => report.ready || is_unready_by_queue(report),
        NodeState::Starting | NodeState::Warming | NodeState::Draining | NodeState::Stopped | NodeState::Failed => {
            false
        }
    };
    // A stream that has begun is worth a try at a node that membership still holds for alive.
    let is_known = is_continuation || candidate.age <= MAX_REPORT_AGE;
    is_up && is_known && candidate.may_serve
}

/// Its queue is all that is wrong with it: it computes well, but others should be asked first.
fn is_unready_by_queue(report: &LoadReport) -> bool {
    let degrades = |reason: &str| DegradedBy::ALL.iter().any(|cause| cause.code() == reason);
    report.reasons.iter().any(|reason| reason == SATURATED)
        && report.reasons.iter().all(|reason| reason == SATURATED || degrades(reason))
}

/// A usable candidate, as this request finds it.
#[derive(Clone, Copy, Debug)]
struct Standing {
    index: usize,
    is_here: bool,
    is_same_zone: bool,
    /// The report is young enough to be believed.
    is_known: bool,
    is_ready: bool,
    is_full: bool,
    /// All choices start at once.
    has_seats: bool,
    /// The prompt fits into the queue.
    has_budget: bool,
    seats: f64,
    /// Choices there, running, waiting and on their way.
    occupied: f64,
    choices: f64,
    /// Prompt tokens that wait or are on their way.
    backlog: f64,
    /// Seconds until the backlog is done; 0 with a free seat, or when nothing was measured.
    wait: f64,
    kv_usage: f64,
    /// Seconds to the first token and from one to the next; 0 until measured.
    first_token: f64,
    inter_token: f64,
    drain: f64,
    /// Tokens of the prompt that its cache is likely to hold, and which part of the prompt that is.
    matched_tokens: usize,
    matched_part: f64,
    is_slow: bool,
    is_silent: bool,
    /// Share that its troubles leave it of what it would get, above 0 and at most 1.
    health: f64,
}

impl Standing {
    fn new(index: usize, candidate: &Candidate<'_>, request: &PlacementRequest<'_>) -> Self {
        let report = candidate.report;
        let (seats, choices) = (f64::from(report.seats), f64::from(request.choices));
        let occupied = f64::from(report.running) + f64::from(report.waiting) + f64::from(candidate.sent_choices);
        let has_seats = occupied == 0.0 || occupied + choices <= seats;
        let backlog = report.waiting_tokens.saturating_add(candidate.sent_tokens);
        let drain = sane(report.drain_tokens_per_second);
        let wait = if has_seats || drain == 0.0 { 0.0 } else { backlog as f64 / drain };
        let needed = candidate.sent_tokens.saturating_add(request.prompt_tokens);
        let matched_tokens = matched_tokens(request.prefix_hashes, &report.hot_prefixes);
        Self {
            index,
            is_here: candidate.is_here,
            is_same_zone: candidate.is_same_zone,
            is_known: candidate.age <= MAX_REPORT_AGE,
            is_ready: report.ready,
            is_full: occupied >= seats && projected_saturation(candidate) >= 1.0,
            has_seats,
            // A prompt larger than the whole queue is let in when no other waits.
            has_budget: backlog == 0 || needed <= report.free_token_budget,
            seats: seats.max(1.0),
            occupied,
            choices,
            backlog: backlog as f64,
            wait,
            kv_usage: sane(report.kv_usage).min(1.0),
            first_token: sane(report.time_to_first_token),
            inter_token: sane(report.inter_token_latency),
            drain,
            matched_tokens,
            matched_part: (matched_tokens as f64 / request.prompt_tokens.max(1) as f64).min(1.0),
            is_slow: candidate.slowness.is_some(),
            is_silent: candidate.is_silent,
            health: health(candidate),
        }
    }

    /// What `least-request` compares: how many there are to share with, more where a share is smaller.
    fn crowd(&self) -> f64 {
        (self.occupied + self.choices) / self.health
    }

    /// Seconds that a reply of ordinary length takes; what is on its way makes it longer.
    fn reply_time(&self) -> f64 {
        const ORDINARY_TOKENS: f64 = 100.0;
        (self.first_token + ORDINARY_TOKENS * self.inter_token) * (1.0 + self.occupied / self.seats)
    }

    /// The weight that `balanced` draws with. `pace` is the best reply time in the pool.
    fn balanced_weight(&self, pace: f64) -> f64 {
        let room = match self.has_seats {
            true => (self.seats - self.occupied) / self.seats,
            false => 1.0 / (1.0 + self.wait + self.occupied / self.seats),
        };
        let factors = [room, 1.0 - self.kv_usage, self.relative_speed(pace)];
        let comfort: f64 = factors.into_iter().map(|factor| factor.max(LEAST_FACTOR)).product();
        self.health * comfort * (1.0 + (WHOLE_PREFIX - 1.0) * self.matched_part)
    }

    /// 1 for the fastest, and for one that was not measured yet.
    fn relative_speed(&self, pace: f64) -> f64 {
        let own = self.reply_time();
        if own > 0.0 && pace > 0.0 { (pace / own).min(1.0) } else { 1.0 }
    }
}

/// Fullness of the queue with what is on its way, as far as it does not find a seat.
fn projected_saturation(candidate: &Candidate<'_>) -> f64 {
    let report = candidate.report;
    let reported = sane(report.queue_saturation);
    let free_seats = report.seats.saturating_sub(report.running.saturating_add(report.waiting));
    let queued = candidate.sent_choices.saturating_sub(free_seats);
    if queued == 0 {
        return reported;
    }
    // The report tells no caps, but how full they are with what waits.
    let by_requests = match report.waiting {
        0 => 0.0,
        waiting => reported * (1.0 + f64::from(queued) / f64::from(waiting)),
    };
    let capacity = report.waiting_tokens.saturating_add(report.free_token_budget);
    let backlog = report.waiting_tokens.saturating_add(candidate.sent_tokens);
    let by_tokens = if capacity == 0 { 0.0 } else { backlog as f64 / capacity as f64 };
    reported.max(by_requests).max(by_tokens)
}

/// What slowness leaves of a weight.
pub fn pace_weight(slowness: Option<f64>) -> f64 {
    slowness.map_or(1.0, |slowness| (1.0 / slowness.max(1.0)).max(LEAST_FACTOR))
}

fn health(candidate: &Candidate<'_>) -> f64 {
    let report = candidate.report;
    let by_state = if report.state == NodeState::Degraded { DEGRADED } else { 1.0 };
    let by_age = libm::exp2(-candidate.age.as_secs_f64() / REPORT_HALF_LIFE.as_secs_f64());
    let pressure = sane(report.memory_pressure);
    let by_memory = 1.0 - ((pressure - MEMORY_SHRINKS) / (MEMORY_FULL - MEMORY_SHRINKS)).clamp(0.0, 1.0);
    let given = if candidate.weight.is_finite() { candidate.weight.min(1.0) } else { 0.0 };
    [by_state, by_age, by_memory, pace_weight(candidate.slowness), given]
        .into_iter()
        .map(|factor| factor.max(LEAST_FACTOR))
        .product()
}

/// Keeps the replicas that are at pace, and slow ones with a free seat that would be done before the shortest of the others'
/// queues.
fn leave_out_slow_ones(pool: &mut Vec<Standing>) {
    let at_pace = pool.iter().filter(|standing| !standing.is_slow);
    let soonest = at_pace.map(|standing| standing.wait + standing.reply_time()).fold(f64::INFINITY, f64::min);
    if soonest.is_finite() {
        pool.retain(|standing| !standing.is_slow || (standing.has_seats && standing.reply_time() < soonest));
    }
}

/// This node itself, while it is well and has a free seat, unless a peer holds much more of the prompt.
fn here_if_well(pool: &[Standing]) -> Option<&Standing> {
    let here = pool.iter().find(|standing| standing.is_here && standing.has_seats)?;
    let is_well = here.is_ready && here.health >= 0.5 && here.relative_speed(pace(pool)) >= 0.5;
    let longest = pool.iter().map(|standing| standing.matched_tokens).max().unwrap_or(0);
    (is_well && longest < here.matched_tokens + WORTH_A_HOP).then_some(here)
}

/// The best reply time among those that were measured; 0 when none was.
fn pace(pool: &[Standing]) -> f64 {
    let measured = pool.iter().map(Standing::reply_time).filter(|time| *time > 0.0);
    measured.min_by(f64::total_cmp).unwrap_or(0.0)
}

/// Keeps those that hold most of the prompt, unless nobody holds anything, or their seats are taken twice over.
fn narrow_to_longest_prefix(pool: &mut Vec<Standing>) {
    let is_bearable = |standing: &Standing| standing.occupied < 2.0 * standing.seats;
    let bearable = pool.iter().filter(|standing| is_bearable(standing));
    let longest = bearable.map(|standing| standing.matched_tokens).max().unwrap_or(0);
    if longest > 0 {
        narrow(pool, |standing| is_bearable(standing) && standing.matched_tokens == longest);
    }
}

/// Keeps what passes, if anything does.
fn narrow(pool: &mut Vec<Standing>, passes: impl Fn(&Standing) -> bool) {
    if pool.iter().any(&passes) {
        pool.retain(passes);
    }
}

/// The pool is not empty.
fn choose(strategy: Strategy, pool: &[Standing], random: u64) -> &Standing {
    match strategy {
        Strategy::Balanced => draw_balanced(pool, random),
        Strategy::PrefixCache if pool[0].matched_tokens == 0 => draw_balanced(pool, random),
        Strategy::PrefixCache | Strategy::LeastRequest => least(pool, random, Standing::crowd),
        Strategy::LeastLatency => {
            // Who was not measured yet counts as fast as the fastest, so that it will be.
            let pace = pace(pool);
            least(pool, random, |standing| {
                let own = standing.reply_time();
                (if own > 0.0 { own } else { pace * (1.0 + standing.occupied / standing.seats) }) / standing.health
            })
        }
        Strategy::LeastKvCache => {
            let on_the_way = |standing: &Standing| standing.occupied / standing.seats / 100.0;
            least(pool, random, |standing| (0.01 + standing.kv_usage + on_the_way(standing)) / standing.health)
        }
        Strategy::Throughput => {
            let fastest = pool.iter().map(|standing| standing.drain).fold(0.0, f64::max);
            let rate = |standing: &Standing| if standing.drain > 0.0 { standing.drain } else { fastest.max(1.0) };
            least(pool, random, |standing| standing.crowd() / rate(standing))
        }
        Strategy::Random => draw(pool, random, |standing| standing.health),
        Strategy::PowerOfTwo => {
            let (first, second) = two_of(pool.len(), random);
            if pool[second].crowd() < pool[first].crowd() { &pool[second] } else { &pool[first] }
        }
    }
}

fn draw_balanced(pool: &[Standing], random: u64) -> &Standing {
    let pace = pace(pool);
    draw(pool, random, |standing| standing.balanced_weight(pace))
}

/// Draws with probabilities in proportion to the weights, none of which is 0.
fn draw(pool: &[Standing], random: u64, weight: impl Fn(&Standing) -> f64) -> &Standing {
    let total: f64 = pool.iter().map(&weight).sum();
    let mut point = unit(random) * total;
    let drawn = pool.iter().find(|standing| {
        point -= weight(standing);
        point < 0.0
    });
    drawn.unwrap_or(&pool[pool.len() - 1])
}

/// The cheapest; of equals this node itself, since a hop costs, and else any of them.
fn least(pool: &[Standing], random: u64, cost: impl Fn(&Standing) -> f64) -> &Standing {
    let lowest = pool.iter().map(&cost).min_by(f64::total_cmp).expect("the pool is not empty");
    let cheapest: Vec<&Standing> = pool.iter().filter(|standing| cost(standing) <= lowest).collect();
    let here = cheapest.iter().find(|standing| standing.is_here);
    here.unwrap_or(&cheapest[(random % cheapest.len() as u64) as usize])
}

/// Two indices, different ones if there are two.
fn two_of(len: usize, random: u64) -> (usize, usize) {
    let first = (random >> 32) as usize % len;
    if len == 1 {
        return (first, first);
    }
    let second = (random & u64::from(u32::MAX)) as usize % (len - 1);
    (first, second + usize::from(second >= first))
}

/// When what waits everywhere will have been done.
fn retry_after(usable: &[Standing]) -> Duration {
    let backlog: f64 = usable.iter().map(|standing| standing.backlog).sum();
    let drain: f64 = usable.iter().map(|standing| standing.drain).sum();
    let seconds = if drain > 0.0 { backlog / drain } else { 0.0 };
    Duration::try_from_secs_f64(seconds).unwrap_or(MAX_RETRY_AFTER).clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER)
}

/// What a peer says may be anything.
fn sane(value: f32) -> f64 {
    if value.is_finite() { f64::from(value.max(0.0)) } else { 0.0 }
}

#[cfg(test)]
#[path = "placement_tests.rs"]
mod tests;
