/// What a policy's table must fulfil, found out by going through every cell that its rows' bounds cut the axes into
/// (edgesd/runtime/policycheck.py): no gap, no row that is never first, nothing that gets dearer as things get worse.
private let maxCells = 200_000

func check(_ policy: Policy) throws {
    func refused(_ came: String, _ allowed: String) -> EdgesdError {
        dataError("policy \(policy.name): \(came)", allowed, "Correct the table as docs/policies.md describes")
    }
    let rows = policy.rows
    guard Set(rows.map(\.name)).count == rows.count else { throw refused("two rows of one name", "names that tell rows apart") }
    try checkLevels(rows, refused)
    let axes = policy.axes, values = axes.map { cuts(policy, $0) }
    var cells = 1
    for cut in values {
        cells *= cut.count
        guard cells <= maxCells else { throw refused("more than \(maxCells) cells", "fewer bounds or axes") }
    }
    // Whether each row's condition holds at each value of each axis; a cell is then a few look-ups.
    let holds = rows.map { row in
        zip(axes, values).map { axis, cut in cut.map { row.when.conditions[axis]?.holds($0) ?? true } }
    }
    var strides = [Int](repeating: 1, count: axes.count)
    for i in axes.indices.dropLast().reversed() { strides[i] = strides[i + 1] * values[i + 1].count }
    func place(_ cell: Int, _ axis: Int) -> Int { cell / strides[axis] % values[axis].count }
    func told(_ cell: Int) -> String {
        let at = axes.indices.map { "\(axes[$0].rawValue) \(plain(values[$0][place(cell, $0)]))" }
        return at.isEmpty ? "any state" : at.joined(separator: ", ")
    }
    var found: [Int] = []
    found.reserveCapacity(cells)
    for cell in 0..<cells {
        guard let row = holds.firstIndex(where: { held in axes.indices.allSatisfy { held[$0][place(cell, $0)] } }) else {
            throw refused("a gap: no row holds at \(told(cell))", "a row for every state")
        }
        found.append(row)
    }
    let reached = Set(found)
    if let never = rows.indices.first(where: { !reached.contains($0) }) {
        throw refused("row \(rows[never].name) is never reached: rows before it take all it would", "rows in use")
    }
    for cell in 0..<cells {
        for axis in axes.indices where place(cell, axis) + 1 < values[axis].count {
            let (row, worse) = (rows[found[cell]], rows[found[cell + strides[axis]]])
            guard worse.level >= row.level else {
                throw refused("row \(worse.name) (level \(worse.level)) follows row \(row.name) (level \(row.level)) as "
                    + "\(axes[axis].rawValue) gets worse from \(told(cell))", "a level that never falls as it gets worse")
            }
        }
    }
}

/// Rows of one level give the same; a higher level costs no more, in MACs and in each part.
private func checkLevels(_ rows: [PolicyRow], _ refused: (String, String) -> EdgesdError) throws {
    let ranked = rows.enumerated().sorted { ($0.element.level, $0.offset) < ($1.element.level, $1.offset) }.map(\.element)
    for (row, worse) in zip(ranked, ranked.dropFirst()) {
        guard row.level != worse.level || row.then == worse.then else {
            throw refused("rows \(row.name) and \(worse.name) of level \(row.level) give different things", "one outcome a level")
        }
        guard cost(worse.then) <= cost(row.then) else {
            throw refused("row \(worse.name) of level \(worse.level) costs more than row \(row.name) of level \(row.level)",
                          "a cost that never rises with the level")
        }
        // Each part by itself too: a bundle without narrow widths, or a user's floor, takes one part's saving away.
        let parts = [
            ("steps", worse.then.steps <= row.then.steps), ("width", worse.then.width <= row.then.width),
            ("guidance_until", worse.then.guidanceUntil <= row.then.guidanceUntil),
            ("upscaler", !worse.then.upscaler || row.then.upscaler), ("refiner", !worse.then.refiner || row.then.refiner),
        ]
        for (name, good) in parts where !good {
            throw refused("row \(worse.name) of level \(worse.level) raises \(name) over row \(row.name) of level "
                + "\(row.level), so it is dearer where limits cap the rest", "\(name) that does not rise")
        }
    }
}

/// Values to test on an axis, best first: bounds, midpoints between them, and an end where a condition holds there alone.
private func cuts(_ policy: Policy, _ axis: Axis) -> [Double] {
    switch axis {
    case .thermal: return [0, 1, 2, 3]
    case .charging: return [1, 0]
    case .saver: return [0, 1]
    default: break
    }
    let end = axis == .battery ? 1 : unbounded
    var bounds: Set<Double> = [], alone: Set<Double> = []
    for row in policy.rows {
        guard case .between(let low, let high)? = row.when.conditions[axis] else { continue }
        bounds.formUnion([low, high].compactMap { $0 }.map { min($0, end) })
        if low >= end || high == 0 { alone.insert(min(low, end)) }
    }
    let edges = bounds.union([0, end]).sorted()
    let between = zip(edges, edges.dropFirst()).map { ($0 + $1) / 2 }
    let sorted = Set(between).union(bounds.subtracting([0, end])).union(alone).sorted()
    return axis == .headroom || axis == .secondsPerCall ? sorted : sorted.reversed()
}
