import Foundation

/// Consecutive rows of coefficients; [0] is the newest.
public struct Rows: Sendable {
    public var inputCoef, outputCoef: [[Float]]
    public var noiseCoef: [Float]
}

/// One sampler at one step count as data: the banded recurrence of docs/sampling.md (edgesd/runtime/table.py).
///
/// timestep, alpha, sigma [R]; rows: input [R][P], output [R][Q], noise [R]; draws: z is drawn there, even where its
/// coefficient is 0. order: rows per step. starts: start row -> its warm-up rows.
public struct SamplerTable: Sendable {
    static let maxInputs = 4, maxOutputs = 5, maxSteps = 1000
    public static let predictionTypes = ["epsilon", "v_prediction", "sample", "flow", "edm"]

    public let name, predictionType: String
    public let steps, order: Int
    public let timestep, alpha, sigma: [Float]
    public let shared: Rows
    public let draws: [Bool]
    public let initScale: Float
    public let starts: [Int: Rows]

    public var rows: Int { timestep.count }
    public var inputs: Int { shared.inputCoef[0].count }
    public var outputs: Int { shared.outputCoef[0].count }

    /// Input, output and noise coefficients of a row in a run that began at row `start`.
    func coefficients(_ row: Int, start: Int) -> (input: [Float], output: [Float], noise: Float) {
        if start > 0, let warm = starts[start], row - start < warm.noiseCoef.count {
            return (warm.inputCoef[row - start], warm.outputCoef[row - start], warm.noiseCoef[row - start])
        }
        return (shared.inputCoef[row], shared.outputCoef[row], shared.noiseCoef[row])
    }

    /// (skip, out) with x0 = skip u + out e, the prediction of the clean latents.
    public func x0Coefficients(_ row: Int) -> (skip: Float, out: Float) {
        let (a, s) = (Double(alpha[row]), Double(sigma[row]))
        let pair: (Double, Double)
        switch predictionType {
        case "epsilon": pair = (1 / a, -s / a)
        case "v_prediction": pair = (a, -s)
        case "sample": pair = (0, 1)
        case "flow": pair = (1 / (a + s), -s / (a + s))
        default: pair = ((1 - s * s) / a, s * (1 - s * s).squareRoot() / a)  // edm
        }
        return (Float(pair.0), Float(pair.1))
    }
}

/// The tables of one safetensors file, made when asked for. Anything malformed is a DataError.
public struct TableFile: Sendable {
    static let format = "edgesd-tables-1"
    static let maxBytes = 64 << 20
    private let groups: [String: TableGroup]

    public init(_ data: [UInt8]) throws {
        guard data.count <= TableFile.maxBytes else { throw TableFile.broken("are more than \(TableFile.maxBytes) bytes") }
        do {
            let file = try Safetensors(parsing: data)
            let heads = try Json.parse(Array((file.metadata[TableFile.format] ?? "").utf8)).object?.fields ?? []
            guard !heads.isEmpty else { throw Safetensors.Malformed(reason: "no tables of format \(TableFile.format)") }
            var groups: [String: TableGroup] = [:]
            for (name, head) in heads { groups[name] = try TableGroup(name, head, file.tensors) }
            self.groups = groups
        } catch let error as Safetensors.Malformed {
            throw TableFile.broken("do not parse (\(shown(error.reason, limit: 120)))")
        } catch let error as Json.Malformed {
            throw TableFile.broken("do not parse (\(shown(error.reason, limit: 120)))")
        }
    }

    /// nil where the file has no such table.
    public func table(_ name: String, steps: Int) -> SamplerTable? { groups[name]?.table(steps) }

    private static func broken(_ what: String) -> EdgesdError {
        dataError("the sampler tables \(what)", "what docs/sampling.md describes", "Get the bundle again")
    }
}

/// One sampler's arrays for all its step counts end to end, checked whole on construction.
private struct TableGroup: Sendable {
    let name, predictionType: String
    let order, p, q: Int
    let steps, rows, warmRows: [Int]
    let initScale, timestep, alpha, sigma, noiseCoef, inputCoef, outputCoef, warmCoef: [Float]
    let draws: [Bool]

    init(_ name: String, _ head: Json, _ arrays: [String: AnyArray]) throws {
        func bad(_ what: String) -> Safetensors.Malformed { .init(reason: "\(shown(name, limit: 64)): \(what)") }
        func floats(_ key: String, _ shape: [Int]) throws -> [Float] {
            guard let array = arrays["\(name)/\(key)"]?.f32, array.shape == shape, array.isFinite else {
                throw bad("\(key), its type, shape or numbers")
            }
            return array.values
        }
        guard let kind = head["prediction_type"]?.text, SamplerTable.predictionTypes.contains(kind),
            let order = head["order"]?.whole, (1...4).contains(order),
            let p = head["inputs"]?.whole, (1...SamplerTable.maxInputs).contains(p),
            let q = head["outputs"]?.whole, (1...SamplerTable.maxOutputs).contains(q)
        else { throw bad("prediction type, order or band") }
        guard let steps = arrays["\(name)/steps"]?.i32, let rows = arrays["\(name)/rows"]?.i32, steps.shape == rows.shape,
            steps.shape.count == 1, (1...SamplerTable.maxSteps).contains(steps.count),
            zip(steps.values, steps.values.dropFirst()).allSatisfy(<), steps.values.first! >= 1,
            steps.values.last! <= SamplerTable.maxSteps,
            rows.values.allSatisfy({ $0 >= 1 && $0 <= 8 * SamplerTable.maxSteps })
        else { throw bad("steps and rows") }
        (self.name, predictionType, self.order, self.p, self.q) = (name, kind, order, p, q)
        (self.steps, self.rows) = (steps.values.map(Int.init), rows.values.map(Int.init))
        let total = self.rows.reduce(0, +)
        initScale = try floats("init_scale", [steps.count])
        (timestep, noiseCoef) = (try floats("timestep", [total]), try floats("noise_coef", [total]))
        (alpha, sigma) = (try floats("alpha", [total]), try floats("sigma", [total]))
        (inputCoef, outputCoef) = (try floats("input_coef", [total, p]), try floats("output_coef", [total, q]))
        guard let draws = arrays["\(name)/draws"]?.u8, draws.shape == [total], draws.values.allSatisfy({ $0 <= 1 }) else {
            throw bad("draws")
        }
        self.draws = draws.values.map { $0 == 1 }
        guard zip(alpha, sigma).allSatisfy({ (a: Float, s: Float) -> Bool in a >= 0 && s >= 0 && a + s > 0 }) else { throw bad("a sign") }
        guard kind != "epsilon" || alpha.allSatisfy({ $0 > 0 }) else { throw bad("alpha 0 with epsilon prediction") }
        let places = zip(self.rows, self.steps).flatMap { rows, steps in
            TableGroup.possibleStarts(rows, steps, order).map { rows - $0 }
        }
        guard let warm = arrays["\(name)/warm_rows"]?.u8, warm.shape == [places.count] else { throw bad("the number of starts") }
        warmRows = warm.values.map(Int.init)
        warmCoef = try floats("warm_coef", [warmRows.reduce(0) { $0 + TableGroup.packedSize($1, p, q) }])
        guard zip(warmRows, places).allSatisfy(<=) else { throw bad("a warm-up longer than its run") }
    }

    static func possibleStarts(_ rows: Int, _ steps: Int, _ order: Int) -> StrideTo<Int> {
        stride(from: order, to: min(rows, steps * order), by: order)
    }

    /// Warm-up row k has seen k+1 inputs and outputs: floats that `count` rows take.
    static func packedSize(_ count: Int, _ p: Int, _ q: Int) -> Int {
        (0..<count).reduce(0) { (sum: Int, k: Int) -> Int in sum + min(k + 1, p) + min(k + 1, q) + 1 }
    }

    func table(_ wanted: Int) -> SamplerTable? {
        guard let at = steps.firstIndex(of: wanted) else { return nil }
        let first = rows[..<at].reduce(0, +), range = first..<first + rows[at]
        // A short run has a shorter memory than its sampler's widest band: columns it never uses are left off again.
        let (p, q) = (used(inputCoef, self.p, range), used(outputCoef, self.q, range))
        var starts: [Int: Rows] = [:]
        var number = 0
        for (rows, steps) in zip(rows, steps).prefix(at) { number += Array(TableGroup.possibleStarts(rows, steps, order)).count }
        var coef = warmRows[..<number].reduce(0) { $0 + TableGroup.packedSize($1, self.p, self.q) }
        for start in TableGroup.possibleStarts(rows[at], wanted, order) {
            starts[start] = warmUp(warmRows[number], &coef, p, q)
            number += 1
        }
        return SamplerTable(
            name: name, predictionType: predictionType, steps: wanted, order: order, timestep: Array(timestep[range]),
            alpha: Array(alpha[range]), sigma: Array(sigma[range]),
            shared: Rows(
                inputCoef: range.map { Array(inputCoef[$0 * self.p..<$0 * self.p + p]) },
                outputCoef: range.map { Array(outputCoef[$0 * self.q..<$0 * self.q + q]) },
                noiseCoef: Array(noiseCoef[range])),
            draws: Array(draws[range]), initScale: initScale[at], starts: starts)
    }

    private func used(_ coef: [Float], _ columns: Int, _ range: Range<Int>) -> Int {
        (0..<columns).last { column in range.contains { coef[$0 * columns + column] != 0 } }.map { $0 + 1 } ?? 1
    }

    private func warmUp(_ count: Int, _ at: inout Int, _ p: Int, _ q: Int) -> Rows {
        var out = Rows(inputCoef: [], outputCoef: [], noiseCoef: [])
        for k in 0..<count {
            let (i, o) = (min(k + 1, self.p), min(k + 1, self.q))
            func padded(_ from: Int, _ count: Int, _ columns: Int) -> [Float] {
                Array((warmCoef[from..<from + count] + [Float](repeating: 0, count: columns)).prefix(columns))
            }
            out.inputCoef.append(padded(at, i, p))
            out.outputCoef.append(padded(at + i, o, q))
            out.noiseCoef.append(warmCoef[at + i + o])
            at += i + o + 1
        }
        return out
    }
}
